"""The loop of a stage."""

import math
import time
from collections.abc import Callable, Iterator

import torch

from proteingpt.config import StageConfig
from proteingpt.data.loader import Work
from proteingpt.distributed import gather_objects, sum_over_ranks
from proteingpt.training.balance import Balance
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
    balance: Balance,
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
        began = time.monotonic()
        losses = []
        with engine.accumulating(item.several):
            for pack in item.packs:
                on_device = pack.to(device)
                structure_rows, sequence_rows = encoders.encode(pack.proteins)
                loss_sum = engine.forward(on_device, structure_rows, sequence_rows)
                engine.backward(loss_sum, item.answer_tokens, is_last=pack is item.packs[-1])
                losses.append(loss_sum.detach())
            losses = torch.stack(losses).tolist()  # waits for the device, so that the clock is that of the work
            worked = time.monotonic() - began
        mean_loss, num_tokens = agree_on_loss(losses, item, step, device)
        rate = learning_rate(step, num_steps, stage)
        engine.step(rate)
        # What is repeated in silence is work as well: a rank with nothing else would never be measured again.
        balance.observe(sum(pack.num_tokens for pack in item.packs), worked)
        balance.exchange(step + 1)
        now = time.monotonic()
        report = StepReport(
            mean_loss, rate, engine.grad_norm, num_tokens, item.num_samples, now - step_ended, began - step_ended
        )
        monitor.step(step + 1, report)
        after_step(step + 1)
        step_ended = time.monotonic()


def tokens_of(item: Work) -> int:
    """Tokens that this rank read for the step; what it repeats in silence does not count."""
    return sum(pack.num_tokens for pack in item.packs if pack.num_answer_tokens)


def agree_on_loss(losses: list[float], item: Work, step: int, device) -> tuple[float, int]:
    """(loss per answer token, tokens read) of the step over all ranks. NonFiniteLoss on every rank, naming the samples,
    if any rank's loss is not finite.

    The one collective beside DeepSpeed's: a rank that stopped on its own would leave the others waiting in theirs.
    """
    bad = [key for loss, pack in zip(losses, item.packs) if not math.isfinite(loss) for key in pack.keys]
    total, num_bad, num_tokens = sum_over_ranks([0.0 if bad else sum(losses), float(bool(bad)), tokens_of(item)], device)
    if num_bad:
        samples = [key for keys in gather_objects(bad) for key in keys]
        raise NonFiniteLoss(
            f"the loss of step {step} is not finite, on {int(num_bad)} rank(s), with samples {', '.join(samples)}; "
            "no weight has changed. Look at these samples: the same command goes on from the last checkpoint and meets "
            "them again; with a lower learning rate or other shards, begin in another --output"
        )
    return total / item.answer_tokens, int(num_tokens)
