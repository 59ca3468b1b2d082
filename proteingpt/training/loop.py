"""The loop of a stage."""

import math
import time
from collections.abc import Callable, Iterator

import torch

from proteingpt.config import StageConfig
from proteingpt.data.loader import Work
from proteingpt.distributed import gather_objects, sum_over_ranks
from proteingpt.training.engine import Engine
from proteingpt.training.monitor import Monitor, StepReport
from proteingpt.training.schedule import learning_rate


class NonFiniteLoss(ValueError):
    """The loss of a step is NaN or infinite. Raised on every rank, before the weights have changed."""


def train(
    engine: Engine,
    encoders,
    work: Iterator[Work],
    stage: StageConfig,
    monitor: Monitor,
    device: torch.device,
    *,
    first_step: int,
    num_steps: int,
    after_step: Callable[[int], None],
):
    """Steps first_step .. num_steps - 1. `after_step(n)` is called with n steps done: it saves and evaluates."""
    step_ended = time.monotonic()
    for step in range(first_step, num_steps):
        item = next(work)
        waited = time.monotonic() - step_ended
        pack = item.pack.to(device)
        structure_rows, sequence_rows = encoders.encode(pack.proteins)
        loss_sum = engine.forward(pack, structure_rows, sequence_rows)
        mean_loss, num_tokens = agree_on_loss(loss_sum, pack, item.answer_tokens, step, device)
        rate = learning_rate(step, num_steps, stage)
        engine.update(loss_sum, item.answer_tokens, rate)
        seconds = time.monotonic() - step_ended
        monitor.step(
            step + 1, StepReport(mean_loss, rate, engine.grad_norm, num_tokens, item.num_samples, seconds, waited)
        )
        after_step(step + 1)
        step_ended = time.monotonic()


def agree_on_loss(loss_sum, pack, answer_tokens: int, step: int, device) -> tuple[float, int]:
    """(loss per answer token, tokens read) of the step over all ranks. NonFiniteLoss on every rank, naming the samples,
    if any rank's loss is not finite.

    The one collective beside DeepSpeed's: a rank that stopped on its own would leave the others waiting in theirs.
    """
    mine = float(loss_sum.detach())
    bad = not math.isfinite(mine)
    read = pack.num_tokens if pack.num_answer_tokens else 0
    total, num_bad, num_tokens = sum_over_ranks([0.0 if bad else mine, float(bad), read], device)
    if num_bad:
        samples = [key for keys in gather_objects(pack.keys if bad else []) for key in keys]
        raise NonFiniteLoss(
            f"the loss of step {step} is not finite, on {int(num_bad)} rank(s), with samples {', '.join(samples)}; "
            "the weights are those of the step before. Look at these samples, or lower the learning rate"
        )
    return total / answer_tokens, int(num_tokens)
