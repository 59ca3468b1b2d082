"""The plan: which questions are in which optimizer step, and in which packs. Who computes them is data/shares.py.

Pure, integers in and integers out. None of it looks at the devices: groups, packs and steps are the same on any of
them, so a run's whole data state is the step number. An epoch is planned window by window. A window is some of the
shards, drawn anew in each epoch; its steps follow from the shards' totals, so step n is found, and planned in the
memory of one window (window.py), without what comes before it. Given up for that: a step that reaches over the border
of two windows, so that steps of small windows are less even. What others need of groups.py and window.py is named here.
"""

from dataclasses import dataclass, replace

import numpy as np

from proteingpt.data.groups import Cut, PlanError, Samples, fingerprint, hash_keys, join, longest_turn, mix
from proteingpt.data.window import GROUPS_SAMPLED, WindowPlan, packing_rate, plan_window

__all__ = [
    "GROUPS_SAMPLED", "Cut", "PlanError", "Samples", "Totals", "Window", "WindowPlan", "fingerprint", "hash_keys",
    "join", "mix", "num_steps", "packing_rate", "plan_window", "survey", "windows",
]  # fmt: skip

# Questions of a window, where the recipe does not say how many shards it has: the PDB's 3.8 million are one window, and
# planning one takes less than 1 GB.
QUESTIONS_PER_WINDOW = 2**22
# One more whenever the same data and recipe come out as other packs or steps: a run goes on only under the plan it was
# begun with. The stored orders in tests/unit/data/test_plan.py tell when.
VERSION = 2
# Sizes of shards are kept in parts of a token, or of a question: integers, whose sums do not depend on their order.
PARTS = 1024


@dataclass(frozen=True)
class Totals:
    """What the plan keeps of all H shards. sizes: int64 (H,), what an epoch expects of a shard, in PARTS of a question,
    or of a token where steps are of tokens; questions: int64 (H,), at most in an epoch; packs_per_token: from
    packing_rate, where steps are of tokens."""

    sizes: np.ndarray
    questions: np.ndarray
    packs_per_token: float = 0.0


@dataclass(frozen=True)
class Window:
    """Shards read together, and the steps of the epoch that are made of them."""

    shards: tuple[int, ...]
    first_step: int
    num_steps: int


def survey(samples: Samples, cut: Cut) -> tuple[int, int]:
    """A shard's entry in Totals: (size, questions). PlanError where one of its questions fits no pack."""
    check_fits(samples, cut)
    asked = np.minimum(samples.num_turns, cut.questions_per_protein or samples.num_turns)
    most = int((asked * np.ceil(samples.weights).astype(np.int64)).sum())
    if cut.tokens_per_step is None:
        expected = asked
    else:
        sums = np.add.reduceat(np.append(samples.turn_tokens, 0), samples.first_turn[:-1]) * (samples.num_turns > 0)
        prefixes = samples.prefix_tokens * -(-asked // cut.questions_per_group)
        expected = prefixes + sums * asked / np.maximum(1, samples.num_turns)
    return int(np.rint(expected * samples.weights * PARTS).astype(np.int64).sum()), most


def check_fits(samples: Samples, cut: Cut):
    """Of all questions, not only those that some epoch draws: what does not fit is said before the run begins."""
    if cut.tokens_per_pack is None:
        return
    longest = longest_turn(samples)
    short = cut.tokens_per_pack - samples.prefix_tokens - longest
    if len(short) and (short * (samples.num_turns > 0)).min() < 0:
        worst = int(np.argmin(short * (samples.num_turns > 0)))
        raise PlanError(
            f"tokens_per_pack is {cut.tokens_per_pack}, but a protein takes {samples.prefix_tokens[worst]} tokens and "
            f"its longest question {longest[worst]}: raise tokens_per_pack or lower data.max_residues"
        )


def num_steps(totals: Totals, cut: Cut) -> int:
    """Steps of every epoch, so that the length of a schedule is known beforehand. Fewer than the recipe's share asks
    for only where there are fewer questions."""
    most = int(totals.questions.sum())
    if most == 0:
        raise PlanError("there is no question in the training split")
    size = int(totals.sizes.sum())
    if cut.tokens_per_step is None:
        steps = -(-size // (cut.samples_per_step * PARTS))
    else:
        rate = totals.packs_per_token or 1 / cut.tokens_per_pack
        steps = round(size / PARTS * rate * cut.tokens_per_pack / cut.tokens_per_step)
    return min(max(1, steps), most)


def windows(totals: Totals, cut: Cut, epoch: int) -> list[Window]:
    """The windows of an epoch. Its steps are shared among them by size, each getting one at least: shards too small for
    that are joined to the next window, as if the step had asked for more of them."""
    steps = num_steps(totals, cut)
    order = np.argsort(mix(np.arange(len(totals.sizes)), cut.seed, epoch, 3), kind="stable")
    last_of_window = window_ends(totals.questions[order], cut.shards_per_window)
    through = np.cumsum(totals.sizes[order])[last_of_window]
    asked = np.cumsum(totals.questions[order])[last_of_window]
    ends = within_reach(share_out(through, int(totals.sizes.sum()), steps), asked, steps)
    made, first_shard, first_step = [], 0, 0
    for last, end in zip(last_of_window.tolist(), ends.tolist()):
        if end > first_step:
            made.append(Window(tuple(order[first_shard : last + 1].tolist()), first_step, end - first_step))
            first_shard, first_step = last + 1, end
    if first_shard < len(order):
        made[-1] = replace(made[-1], shards=made[-1].shards + tuple(order[first_shard:].tolist()))
    return made


def window_ends(questions: np.ndarray, shards_per_window: int | None) -> np.ndarray:
    """int64: the last shard of each window, of shards in the order in which they are read."""
    if shards_per_window is not None:
        return np.append(np.arange(shards_per_window, len(questions), shards_per_window) - 1, len(questions) - 1)
    ends, held = [], 0
    for shard, count in enumerate(questions.tolist()):
        if held and held + count > QUESTIONS_PER_WINDOW:
            ends.append(shard - 1)
            held = 0
        held += count
    return np.array([*ends, len(questions) - 1], np.int64)


def share_out(through: np.ndarray, total: int, parts: int) -> np.ndarray:
    """int64: of `parts`, how many are due when so much of `total` is through. Python's integers: no overflow."""
    return np.array([size * parts // total for size in through.tolist()], np.int64)


def within_reach(ends: np.ndarray, reached: np.ndarray, parts: int) -> np.ndarray:
    """`ends` (ascending) moved as little as must be, so that no stretch has more parts than it has items.

    reached: int64, items through at the end of each stretch, of which there are `parts` at least in all.
    """
    ends = reached + np.minimum.accumulate(np.minimum(ends - reached, 0))
    return np.maximum(ends, parts - (reached[-1] - reached))
