"""The loop of a stage. A step is three things:

1. this rank's forwards and backwards, alone: nothing waits for another rank (but under ZeRO 3, see training.engine);
2. one agreement of all ranks: the loss, and what went wrong on any of them;
3. all alike: reduce and take the step, or drop its gradients and skip it, replay it, go back, or end the run.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from proteingpt.config import StageConfig
from proteingpt.data.collate import Pack
from proteingpt.data.loader import Work
from proteingpt.distributed import gather_objects, sum_over_ranks
from proteingpt.encoders.ahead import RunAhead
from proteingpt.training.balance import Balance
from proteingpt.training.clock import Clock
from proteingpt.training.engine import Engine
from proteingpt.training.guard import Action, Guard, LossSpike, NonFiniteLoss, RollBack, Seen, passed
from proteingpt.training.monitor import Monitor, StepReport
from proteingpt.training.schedule import learning_rate
from proteingpt.training.tally import Tally

log = logging.getLogger("proteingpt")


class OutOfMemory(ValueError):
    """A rank has not the memory for a forward, in a setting in which the step cannot be shared out anew."""


class RankFailed(RuntimeError):
    """Another rank has raised within a step. This one had nothing to complain of."""


@dataclass
class Local:
    """What this rank made of its part of a step. losses, norms: of each forward, NaN allowed. error: what ended it."""

    packs: list[Pack]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    error: Exception | None = None
    failed_tokens: int = 0
    seconds: float = 0.0

    @property
    def is_out_of_memory(self) -> bool:
        return self.error is not None and is_out_of_memory(self.error)

    def bad_samples(self) -> list[str]:
        pairs = zip(self.packs, self.losses, self.norms)
        return [
            key for pack, loss, norm in pairs if not math.isfinite(loss) or not math.isfinite(norm) for key in pack.keys
        ]


@dataclass(frozen=True)
class Agreed:
    """The same on every rank. loss: nats per answer token. num_*: ranks with such a fault."""

    loss: float
    num_tokens: int
    num_bad: int
    num_out_of_memory: int
    num_failed: int


def train(
    engine: Engine,
    encoders,
    read: Callable[[int], Iterator[Work]],
    stage: StageConfig,
    monitor: Monitor,
    balance: Balance,
    device: torch.device,
    *,
    first_step: int,
    num_steps: int,
    after_step: Callable[[int], None],
    guard: Guard | None = None,
    set_aside: Callable[[int, tuple[str, ...], str], None] = lambda step, keys, why: None,
    tally: Tally | None = None,
):
    """Steps first_step .. num_steps - 1. read(n): this rank's work from step n on; it is read anew when a step is to be
    shared out otherwise. `after_step(n)` is called with n steps done: it saves and evaluates. `set_aside(step, keys,
    why)` is told of samples that have no weight from now on. tally: counts this rank's work, for those who watch.

    Raises on every rank NonFiniteLoss or LossSpike where the guard gives up, RollBack where it wants to go back,
    PlanError where a pack fits no rank's memory.
    """
    guard, tally = guard or Guard(), tally or Tally(device)
    clock = Clock(device, None if engine.keeps_gradients else engine.module)
    encoders = RunAhead(encoders, device)
    step, work, step_ended = first_step, encoders.of(read(first_step)), time.monotonic()
    try:
        while step < num_steps:
            item = next(work)
            began = time.monotonic()
            if step in guard.state.passed_over:
                guard.state = passed(guard.state)
            else:
                local = compute(engine, encoders, item, device, clock, frozenset(guard.state.quarantined))
                agreed = agree(local, item, device)
                if agreed.num_failed:
                    raise failure(local, step)
                if agreed.num_out_of_memory:
                    engine.drop()
                    work.close()
                    share_out_anew(local, balance, step, device)
                    work = encoders.of(read(step))
                    continue
                rate = learning_rate(step, num_steps, stage)
                conclude(engine, guard, local, agreed, item, step, rate, set_aside)
                # What is repeated in silence is work as well: a rank with nothing else would never be measured again.
                now = time.monotonic()
                balance.observe(sum(pack.num_tokens for pack in item.packs), local.seconds, now - began)
                report = StepReport(
                    agreed.loss, rate, engine.grad_norm, agreed.num_tokens, item.num_samples, now - step_ended,
                    began - step_ended, *encoders.take_seconds(), pack_fill(agreed, item, stage),
                )  # fmt: skip
                tally.add(*read_by(item), report.seconds)
                monitor.step(step + 1, report)
            exchanged = balance.exchange(step + 1, tally.take)
            if exchanged:
                monitor.ranks(step + 1, exchanged)
            step += 1
            after_step(step)
            step_ended = time.monotonic()
    finally:
        if hasattr(work, "close"):
            work.close()


# ------------------------------------------------------------------------------------------- 1. this rank, alone


def compute(engine: Engine, encoders: RunAhead, item: Work, device, clock: Clock, quarantined: frozenset[str]) -> Local:
    """This rank's forwards and backwards. Where others do not wait in them, what they raise is kept for the agreement;
    else it is raised at once, and the others learn of it by this rank's end."""
    local = Local([silence(pack, quarantined) for pack in item.packs])
    losses, norms, pack = [], [], None
    try:
        with clock, engine.accumulating(item.several):
            for pack in local.packs:
                rows = clean_rows(encoders.rows(pack), pack.keys, quarantined)
                loss_sum = engine.forward(pack.to(device), *rows)
                norms.append(engine.backward(loss_sum, item.answer_tokens, is_last=pack is local.packs[-1]).detach())
                losses.append(loss_sum.detach())
                del rows, loss_sum
            # One wait for the device, and so that the clock is that of the work.
            local.losses, local.norms = torch.stack([torch.stack(losses).float(), torch.stack(norms).float()]).tolist()
    except Exception as error:
        if not engine.keeps_gradients:
            if is_out_of_memory(error):
                raise OutOfMemory(out_of_memory_text(pack)) from error
            raise
        # With its frames it would hold on to the memory that it ran out of.
        local.error, local.failed_tokens = (
            error.with_traceback(None) if is_out_of_memory(error) else error,
            pack.num_tokens,
        )
        losses.clear(), norms.clear()
    if engine.is_fp16:
        local.norms = [0.0] * len(local.norms)  # too large a loss scale is DeepSpeed's to deal with
    local.seconds = clock.seconds()
    return local


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU torch has a class for it; on a CPU its allocator raises a RuntimeError."""
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in said or "can't allocate memory" in said)
    )


def out_of_memory_text(pack: Pack) -> str:
    return (
        f"no memory for a forward of {pack.num_tokens} tokens: lower devices.tokens_per_forward or tokens_per_pack. "
        "Under ZeRO 3, and where more trains than a rank can keep the gradients of, a step cannot be shared out anew "
        "by itself"
    )


def silence(pack: Pack, quarantined: frozenset[str]) -> Pack:
    """Without weight on the answers of quarantined samples. The step's denominator stays the plan's."""
    out = [number for number, key in enumerate(pack.keys) if key in quarantined]
    if not out:
        return pack
    group = np.searchsorted(pack.group_starts, pack.predict_positions.numpy(), side="right") - 1
    return replace(pack, weights=pack.weights * torch.from_numpy(~np.isin(group, out)))


def clean_rows(rows, keys: list[str], quarantined: frozenset[str]):
    """Zeros in the place of a quarantined protein's rows: a NaN times a weight of 0 would still be a NaN."""
    if not quarantined.intersection(keys):
        return rows
    return tuple([torch.zeros_like(r) if key in quarantined else r for r, key in zip(kind, keys)] for kind in rows)


# --------------------------------------------------------------------------------------------------- 2. agreement


def agree(local: Local, item: Work, device) -> Agreed:
    """The one collective beside DeepSpeed's: a rank that stopped on its own would leave the others waiting in
    theirs."""
    bad, lacks_memory = bool(local.bad_samples()), local.is_out_of_memory
    num_answer_tokens = sum(pack.num_answer_tokens for pack in local.packs)
    loss = 0.0 if bad or local.error else sum(local.losses)
    mine = [loss, num_answer_tokens, read_by(item)[0], bad, lacks_memory, local.error is not None and not lacks_memory]
    total, answers, tokens, *counts = sum_over_ranks([float(value) for value in mine], device)
    mean = math.nan if counts[0] else total / max(1.0, answers)
    return Agreed(mean, int(tokens), *(int(count) for count in counts))


def read_by(item: Work) -> tuple[int, int]:
    """Tokens, and answer tokens, that this rank read for the step; what it repeats in silence does not count."""
    answers = [pack.num_answer_tokens for pack in item.packs]
    return sum(pack.num_tokens for pack, count in zip(item.packs, answers) if count), sum(answers)


def pack_fill(agreed: Agreed, item: Work, stage: StageConfig) -> float | None:
    """Share of what the step's packs could hold that they hold; None where only the LLM bounds them."""
    room = item.num_packs * (stage.tokens_per_pack or 0)
    return agreed.num_tokens / room if room else None


# ---------------------------------------------------------------------------------------------- 3. all ranks alike


def failure(local: Local, step: int) -> Exception:
    """This rank's own error, or the news of another's."""
    said = gather_objects(None if local.error is None else f"{type(local.error).__name__}: {local.error}")
    if local.error is not None and not local.is_out_of_memory:
        return local.error
    others = "; ".join(f"rank {rank} at step {step}: {text}" for rank, text in enumerate(said) if text)
    return RankFailed(others)


def share_out_anew(local: Local, balance: Balance, step: int, device):
    """Halve the limit of each rank that ran out of memory. OutOfMemory, on all ranks, where one has not the memory for
    what it repeats in silence: no forward of its own is over its limit, and less than that no rank can be given."""
    lacking = gather_objects(local.failed_tokens if local.is_out_of_memory else 0)
    local.error = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for rank, num_tokens in enumerate(lacking):
        if num_tokens > (balance.limits[rank] or num_tokens):
            raise OutOfMemory(
                f"rank {rank} has no memory for {num_tokens} tokens, the shortest pack of step {step}, even without "
                "packs of its own: lower tokens_per_pack, set model.activation_checkpointing, or leave the device out"
            )
    for rank, num_tokens in enumerate(lacking):
        if num_tokens:
            balance.lower(rank, num_tokens)
            if torch.distributed.get_rank() == 0:
                log.warning(
                    "rank %d ran out of memory in a forward of %d tokens: at most %d from now on; step %d is replayed",
                    rank, num_tokens, balance.limits[rank], step,
                )  # fmt: skip


def conclude(engine: Engine, guard: Guard, local: Local, agreed: Agreed, item: Work, step: int, rate: float, set_aside):
    """Take the step, or drop it as the guard decides."""
    norm = engine.grad_norm = math.nan if agreed.num_bad else engine.reduce()
    if engine.is_fp16 and not agreed.num_bad and not math.isfinite(norm):
        engine.step(rate)  # DeepSpeed lowers its loss scale, and changes no weight
        guard.state = passed(guard.state)
        return
    seen = Seen(step, agreed.loss, norm)
    if guard.is_bad(seen):
        seen = replace(seen, samples=tuple(suspects(local, guard)))
    decision = guard.judge(seen)
    if decision.action is Action.TAKE:
        if not engine.step(rate):
            guard.state = passed(guard.state)
        return
    engine.drop()
    what = f"step {step} is skipped on all ranks: {decision.why}, with samples {', '.join(seen.samples)}"
    if torch.distributed.get_rank() == 0:
        log.warning("%s%s", what, f"; quarantined: {', '.join(decision.quarantined)}" if decision.quarantined else "")
    if decision.quarantined:
        set_aside(step, decision.quarantined, decision.why)
    if decision.action is Action.ROLL_BACK:
        raise RollBack(guard.state, what)
    if decision.action is Action.STOP:
        kind = LossSpike if math.isfinite(seen.loss) and math.isfinite(seen.norm) else NonFiniteLoss
        raise kind(
            f"step {step}: {decision.why}, with samples {', '.join(seen.samples)}; no weight has changed. "
            f"{len(guard.state.skipped)} of the last {guard.config.window} steps were skipped, and the run went back "
            f"{guard.state.roll_backs} times. Look at these samples; with a lower learning rate, other shards or "
            "another guard, begin in another --output"
        )


def suspects(local: Local, guard: Guard) -> list[str]:
    """Keys, the same on every rank, of the samples of the packs that are bad by themselves; of all packs where none is.
    A collective, called once every rank knows that the step is bad."""
    keys = [key for pack in local.packs if pack.num_answer_tokens for key in pack.keys]
    pairs = [
        (pack, loss / pack.num_answer_tokens) for pack, loss in zip(local.packs, local.losses) if pack.num_answer_tokens
    ]
    high = [key for pack, loss in pairs if guard.is_high(loss) for key in pack.keys]
    everyone = gather_objects((local.bad_samples(), high, keys))
    for kind in range(3):
        found = [key for lists in everyone for key in lists[kind]]
        if found:
            return sorted(set(found) - set(guard.state.quarantined))
    return []
