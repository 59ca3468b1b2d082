"""What to do with a step whose loss or gradient is not as the ones before: pure decisions, no tensors.

A step is judged after its gradient is known and before a weight changes. A bad one is skipped, on all ranks alike, and
its samples are noted; a sample noted too often is quarantined: it keeps its place in the plan and has no weight from
then on. When skipping does not help, the run goes back to its last checkpoint and passes over those steps. The state is
small, and goes into the checkpoint, so that a resumed run decides the same. It gives up telling which sample of a step
was at fault: that shows when the same one is in a bad step again.
"""

import math
from dataclasses import dataclass, fields, replace
from enum import Enum
from statistics import median

from proteingpt.config import GuardConfig

# What is large beside a small median and small in itself is no spike: late in a run losses are near 0, and a gradient
# that clipping (1.0 in ds_configs/) leaves alone does no harm.
LEAST_RISE_NATS = 1.0
LEAST_NORM = 1.0


class LossSpike(ValueError):
    """Loss or gradient keep rising far above what they were. Raised on every rank, before the weights have changed."""


class NonFiniteLoss(ValueError):
    """The loss or the gradient of a step is NaN or infinite, and going on without its samples has not helped. Raised on
    every rank, before the weights have changed."""


class RollBack(Exception):
    """Training is to go back to its last checkpoint. state: the guard's, which is to be kept."""

    def __init__(self, state: "GuardState", why: str):
        super().__init__(why)
        self.state = state


@dataclass(frozen=True)
class GuardState:
    """losses (nats per answer token), norms: of the last `window` steps that were taken, oldest first. strikes: skipped
    steps by sample key. quarantined: samples without weight. row: the steps skipped just now, one after another.
    skipped: those among the last `window` steps. passed_over: steps that the run went back behind, which are not
    computed again.
    roll_backs: so many. not_taken: steps behind which changed no weight."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    strikes: tuple[tuple[str, int], ...] = ()
    quarantined: tuple[str, ...] = ()
    row: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    passed_over: tuple[int, ...] = ()
    roll_backs: int = 0
    not_taken: int = 0


@dataclass(frozen=True)
class Seen:
    """Of one step, the same on all ranks. samples: keys of those that may be at fault."""

    step: int
    loss: float
    norm: float
    samples: tuple[str, ...] = ()


class Action(Enum):
    TAKE = "take the step"
    SKIP = "skip it"
    ROLL_BACK = "go back to the last checkpoint"
    STOP = "end the run"


@dataclass(frozen=True)
class Decision:
    """why: of anything but TAKE. quarantined: samples that this step has put there."""

    action: Action
    why: str = ""
    quarantined: tuple[str, ...] = ()


def decide(state: GuardState, config: GuardConfig, seen: Seen) -> tuple[GuardState, Decision]:
    """What to do with a step, and the state after it."""
    why = fault(state, config, seen)
    if why is None:
        losses = (*state.losses, seen.loss)[-config.window :]
        norms = (*state.norms, seen.norm)[-config.window :]
        return replace(state, losses=losses, norms=norms, row=()), Decision(Action.TAKE)
    strikes = dict(state.strikes)
    for key in dict.fromkeys(seen.samples):
        strikes[key] = strikes.get(key, 0) + 1
    known = set(state.quarantined)
    new = tuple(sorted(k for k in set(seen.samples) - known if strikes[k] >= config.quarantine_after))
    row = (*state.row, seen.step)
    skipped = tuple(s for s in state.skipped if s > seen.step - config.window) + (seen.step,)
    state = replace(
        state, strikes=tuple(sorted(strikes.items())), quarantined=(*state.quarantined, *new), row=row, skipped=skipped,
        not_taken=state.not_taken + 1,
    )  # fmt: skip
    half_are_bad = 2 * len(skipped) > config.window
    if len(row) < config.roll_back_after and not half_are_bad:
        return state, Decision(Action.SKIP, why, new)
    if half_are_bad or state.roll_backs >= config.roll_backs:
        return state, Decision(Action.STOP, why, new)
    passed_over = tuple(sorted({*state.passed_over, *row}))
    state = replace(state, row=(), skipped=(), passed_over=passed_over, roll_backs=state.roll_backs + 1)
    return state, Decision(Action.ROLL_BACK, why, new)


def fault(state: GuardState, config: GuardConfig, seen: Seen) -> str | None:
    """What is wrong with a step, in words; None if nothing."""
    if not math.isfinite(seen.loss):
        return "its loss is not finite"
    if not math.isfinite(seen.norm):
        return "its gradient is not finite"
    if is_high(state, config, seen.loss):
        return f"its loss is {seen.loss:.4g}, where {median(state.losses):.4g} is usual"
    if config.norm_factor is None or 2 * len(state.norms) < config.window:
        return None
    usual_norm = median(state.norms)
    if seen.norm > max(config.norm_factor * usual_norm, LEAST_NORM):
        return f"the norm of its gradient is {seen.norm:.4g}, where {usual_norm:.4g} is usual"
    return None


def is_high(state: GuardState, config: GuardConfig, loss: float) -> bool:
    """Whether a loss, of a step or of a pack, is a spike beside the usual loss of a step."""
    if config.spike_factor is None or 2 * len(state.losses) < config.window:
        return False
    usual = median(state.losses)
    return loss > max(config.spike_factor * usual, usual + LEAST_RISE_NATS)


def passed(state: GuardState) -> GuardState:
    """After a step that changed no weight and is nobody's fault: one of `passed_over`, or one that fp16's loss scale
    was too large for."""
    return replace(state, not_taken=state.not_taken + 1)


def carried_over(current: GuardState, saved: GuardState) -> GuardState:
    """The state to go on with from a checkpoint: what was usual then, and what has been learned of samples since."""
    return replace(current, losses=saved.losses, norms=saved.norms, not_taken=saved.not_taken)


def read_state(values: dict | None) -> GuardState:
    """From a checkpoint's JSON, in which tuples are lists; the state of a new run where it holds none."""
    if values is None:
        return GuardState()
    known = {f.name for f in fields(GuardState)}
    made = {name: as_tuple(value) for name, value in values.items() if name in known}
    return GuardState(**made)


def as_tuple(value):
    return tuple(as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


class Guard:
    """The state of a run, for the loop to change and for checkpoints to keep."""

    def __init__(self, config: GuardConfig = GuardConfig(), state: GuardState = GuardState()):
        self.config, self.state = config, state

    def is_bad(self, seen: Seen) -> bool:
        return fault(self.state, self.config, seen) is not None

    def is_high(self, loss: float) -> bool:
        return is_high(self.state, self.config, loss)

    def judge(self, seen: Seen) -> Decision:
        self.state, decision = decide(self.state, self.config, seen)
        return decision
