"""Groups into packs, and packs into the steps of a window: where in an epoch each question stands. Pure.

All of a window is in memory, which bounds what the plan of any data set takes.
"""

from dataclasses import dataclass, replace

import numpy as np

from proteingpt.data.groups import Cut, Groups, Samples, copies_of, hash_groups, make_groups, mix, repeat
from proteingpt.data.packing import best_fit, fill

# Groups packed together. More would mix an epoch better and fill packs no better.
PACKED_TOGETHER = 4096
# Groups that tell how many packs an epoch makes, to a few in a thousand.
GROUPS_SAMPLED = 4 * PACKED_TOGETHER


@dataclass(frozen=True)
class WindowPlan:
    """G groups in P packs in K steps. A group is one protein and some of its questions.

    sample: int64 (G,) index of the protein; turns: int64 (M,) numbers of its questions, all groups' end to end;
    turn_starts: int64 (G + 1,); tokens: int64 (G,), the group's length; pack_starts: int64 (P + 1,) first group of each
    pack; step_starts: int64 (K + 1,) first pack of each step.
    """

    sample: np.ndarray
    turns: np.ndarray
    turn_starts: np.ndarray
    tokens: np.ndarray
    pack_starts: np.ndarray
    step_starts: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.step_starts) - 1

    @property
    def pack_tokens(self) -> np.ndarray:
        """int64 (P,)."""
        return np.add.reduceat(self.tokens, self.pack_starts[:-1])

    def step_tokens(self, number: int) -> list[int]:
        """Tokens of each pack of a step."""
        first, last = self.step_starts[number], self.step_starts[number + 1]
        starts = self.pack_starts[first : last + 1]
        return np.add.reduceat(self.tokens[starts[0] : starts[-1]], starts[:-1] - starts[0]).tolist()

    def step(self, number: int) -> list[list[tuple[int, tuple[int, ...]]]]:
        """The packs of step `number` of this window, each a list of groups (sample, its turns)."""
        return [
            [self.group(g) for g in range(self.pack_starts[pack], self.pack_starts[pack + 1])]
            for pack in range(self.step_starts[number], self.step_starts[number + 1])
        ]

    def group(self, g: int) -> tuple[int, tuple[int, ...]]:
        return int(self.sample[g]), tuple(self.turns[self.turn_starts[g] : self.turn_starts[g + 1]].tolist())


def plan_window(samples: Samples, cut: Cut, epoch: int, steps: int) -> WindowPlan:
    """The questions of a window, drawn and shuffled, in groups, packs and `steps` even steps, none of them empty.

    `steps` as `windows` gives it, at most the questions that there may be. Where that is more than there are packs or
    groups, in very small data sets, packs or groups are cut down to single questions.
    """
    seen = repeat(samples, copies_of(samples, cut, epoch, steps))
    groups = make_groups(seen.samples, cut, epoch)
    if len(groups.sample) < steps:
        groups = make_groups(seen.samples, replace(cut, questions_per_group=1), epoch)
    groups = groups.take(np.argsort(hash_groups(seen.samples, cut, epoch, groups), kind="stable"))
    if cut.tokens_per_step is None:
        groups, pack_of_group, step_of_group = pack_each_step(groups, cut, steps)
    else:
        groups, pack_of_group = pack_together(groups, cut, epoch, steps)
    by_pack = np.argsort(pack_of_group, kind="stable")
    pack_starts = np.append(np.flatnonzero(np.diff(pack_of_group[by_pack], prepend=-1)), len(by_pack))
    if cut.tokens_per_step is None:
        step_of_pack = step_of_group[by_pack][pack_starts[:-1]]
    else:
        step_of_pack = cut_evenly(np.ones(len(pack_starts) - 1, np.int64), steps)
    groups = groups.take(by_pack)
    step_starts = np.searchsorted(step_of_pack, np.arange(steps + 1))
    sample = seen.source[groups.sample]
    return WindowPlan(sample, groups.turns, groups.turn_starts, groups.tokens, pack_starts, step_starts)


def cut_evenly(sizes: np.ndarray, parts: int) -> np.ndarray:
    """The part, 0 .. parts - 1, of each item, so that all parts hold the same size up to one item. None is empty: there
    are as many items as parts at least."""
    before = np.cumsum(sizes) - sizes
    reached = np.arange(len(sizes))
    part = reached + np.minimum.accumulate(before * parts // sizes.sum() - reached)
    return np.maximum(part, parts - len(sizes) + reached)


def pack_each_step(groups: Groups, cut: Cut, steps: int) -> tuple[Groups, np.ndarray, np.ndarray]:
    """Steps of questions: (groups, the pack of each, its step). Packed by best fit within a step."""
    step_of_group = cut_evenly(groups.sizes, steps)
    if cut.tokens_per_pack is None:
        return groups, np.arange(len(step_of_group)), step_of_group
    packs, count, tokens = np.empty(len(step_of_group), np.int64), 0, groups.tokens
    for part in np.split(np.arange(len(packs)), np.flatnonzero(np.diff(step_of_group)) + 1):
        packs[part] = np.array(best_fit(tokens[part].tolist(), cut.tokens_per_pack)) + count
        count = int(packs[part].max()) + 1
    return groups, packs, step_of_group


def pack_together(groups: Groups, cut: Cut, epoch: int, steps: int) -> tuple[Groups, np.ndarray]:
    """Steps of tokens: (groups, some of them split to fill packs, and the pack of each). Packs are shuffled within
    PACKED_TOGETHER groups, because packing makes them from large groups to small."""
    num_groups, count, whole, pieces, pack_of_piece = len(groups.sample), 0, [], [], []
    tokens, prefixes = groups.tokens, groups.prefixes
    for first in range(0, num_groups, PACKED_TOGETHER):
        part = slice(first, first + PACKED_TOGETHER)
        made = fill(tokens[part].tolist(), prefixes[part].tolist(), costs_from(groups, first), cut.tokens_per_pack)
        shuffled = np.argsort(mix(np.arange(count, count + made.number), cut.seed, epoch, 4), kind="stable")
        place = np.full(made.number + 1, -1)  # a group that is split looks at the last
        place[shuffled] = np.arange(count, count + made.number)
        whole.append(place[made.whole])
        pieces += [(first + group, places) for group, places, _ in made.pieces]
        pack_of_piece += [int(place[number]) for _, _, number in made.pieces]
        count += made.number
    if count < steps:
        return groups, np.arange(num_groups)
    packs = np.concatenate(whole)
    unsplit = np.flatnonzero(packs >= 0)
    return groups.take(unsplit).joined(groups.pieces(pieces)), np.append(packs[unsplit], pack_of_piece).astype(np.int64)


def costs_from(groups: Groups, first: int):
    """Tokens of the questions of group `first` + g."""
    return lambda g: groups.costs[groups.turn_starts[first + g] : groups.turn_starts[first + g + 1]].tolist()


def packing_rate(samples: Samples, cut: Cut) -> float:
    """Packs for each token that `survey` counts, by packing some samples: holes take some of a pack, and so do the
    prefixes of groups that are split. With it a step has tokens_per_step / tokens_per_pack packs, not a few percent
    more, which would cost up to a whole pack's time of one rank. 0 where steps are of questions."""
    if cut.tokens_per_step is None or not samples.num_turns.sum():
        return 0.0
    seen = repeat(samples, np.maximum(1, copies_of(samples, cut, 0, 0))).samples
    groups = make_groups(seen, cut, 0)
    groups = groups.take(np.argsort(hash_groups(seen, cut, 0, groups), kind="stable"))
    _, pack_of_group = pack_together(groups, cut, 0, 1)
    return (int(pack_of_group.max()) + 1) / int(groups.tokens.sum())
