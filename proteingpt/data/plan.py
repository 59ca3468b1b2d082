"""The plan: which questions are in which optimizer step, and in which packs. Who computes them is data/shares.py.

Pure, integers in and integers out. None of it looks at the devices: groups, packs and steps are the same on any of them, so
a run's whole data state is the step number. An epoch is planned window by window. A window is some of the shards, drawn anew in each epoch; its steps follow from the shards' totals, so
step n is found, and planned in the memory of one window, without what comes before it. Given up for that: a step that
reaches over the border of two windows, so that steps of small windows are less even.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from proteingpt.data.packing import best_fit, fill

# Groups packed together. More would mix an epoch better and fill packs no better.
PACKED_TOGETHER = 4096
# Groups that tell how many packs an epoch makes, to a few in a thousand.
GROUPS_SAMPLED = 4 * PACKED_TOGETHER
# Questions of a window, where the recipe does not say how many shards it has: the PDB's 3.8 million are one window, and
# planning one takes less than 1 GB.
QUESTIONS_PER_WINDOW = 2**22
# Sizes of shards are kept in parts of a token, or of a question: integers, whose sums do not depend on their order.
PARTS = 1024


class PlanError(ValueError):
    """The data set and the recipe do not go together."""


@dataclass(frozen=True)
class Samples:
    """What the plan knows of S samples and their N questions: those of a shard, or of a window.

    ids: uint64 (S,) from hash_keys; prefix_tokens: int64 (S,), what a group costs beside its questions; first_turn:
    int64 (S + 1,); turn_tokens: int64 (N,), what each question costs behind the prefix; weights: float64 (S,), how often
    a sample is seen in an epoch on average.
    """

    ids: np.ndarray
    prefix_tokens: np.ndarray
    first_turn: np.ndarray
    turn_tokens: np.ndarray
    weights: np.ndarray

    @property
    def num_turns(self) -> np.ndarray:
        return np.diff(self.first_turn)


def join(parts: Sequence[Samples]) -> Samples:
    """The samples of several shards, end to end."""
    num_turns = np.concatenate([part.num_turns for part in parts])
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "prefix_tokens"))
    first_turn = np.concatenate(([0], np.cumsum(num_turns)))
    costs, weights = (np.concatenate([getattr(part, name) for part in parts]) for name in ("turn_tokens", "weights"))
    return Samples(*joined, first_turn, costs, weights)


@dataclass(frozen=True)
class Cut:
    """The recipe's part of the plan. A step is `samples_per_step` questions, or `tokens_per_step` tokens; one is None.

    questions_per_group: that share one prefix, at most. questions_per_protein: drawn anew in each epoch, None for all.
    tokens_per_pack: a pack's bound, None for one group a pack. shards_per_window: shards that an epoch is shuffled
    within, None for as many as hold QUESTIONS_PER_WINDOW.
    """

    seed: int
    questions_per_group: int
    samples_per_step: int | None = None
    tokens_per_step: int | None = None
    tokens_per_pack: int | None = None
    questions_per_protein: int | None = None
    shards_per_window: int | None = None


# ---------------------------------------------------------------------------------------- from shards to windows


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


def packing_rate(samples: Samples, cut: Cut) -> float:
    """Packs for each token that `survey` counts, by packing some samples: holes take some of a pack, and so do the
    prefixes of groups that are split. With it a step has tokens_per_step / tokens_per_pack packs, not a few percent more,
    which would cost up to a whole pack's time of one rank. 0 where steps are of questions."""
    if cut.tokens_per_step is None or not samples.num_turns.sum():
        return 0.0
    seen = repeat(samples, np.maximum(1, copies_of(samples, cut, 0, 0))).samples
    groups = make_groups(seen, cut, 0)
    groups = groups.take(np.argsort(hash_groups(seen, cut, 0, groups), kind="stable"))
    _, pack_of_group = pack_together(groups, cut, 0, 1)
    return (int(pack_of_group.max()) + 1) / int(groups.tokens.sum())


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


def longest_turn(samples: Samples) -> np.ndarray:
    """int64 (S,): tokens of each sample's longest question; of one without questions it means nothing."""
    return np.maximum.reduceat(np.append(samples.turn_tokens, 0), samples.first_turn[:-1])


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


# -------------------------------------------------------------------------------------------- from window to steps


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


def mix(values: np.ndarray, *seeds: int) -> np.ndarray:
    """uint64 -> uint64 hash: splitmix64's finaliser (Steele, Lea, Flood 2014), seeded.

    A permutation made by sorting such hashes does not depend on any library's generator, so it never changes.
    """
    state = values.astype(np.uint64)
    for seed in (*seeds, 0):
        state = state + np.uint64((seed * 2 + 1) * 0x9E3779B97F4A7C15 % 2**64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """uint64 (S,): a stable number for each sample key, so that the order does not depend on shards or positions."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


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


def copies_of(samples: Samples, cut: Cut, epoch: int, steps: int) -> np.ndarray:
    """int64 (S,): how often each sample is seen in this epoch. The part of its weight beyond a whole number is the
    chance of once more, drawn by hash; rounded up for all where the draw would leave a step without a question."""
    whole = np.floor(samples.weights)
    # 53 bits, which a float64 holds.
    drawn = (mix(samples.ids, cut.seed, epoch, 5) >> np.uint64(11)) * 2.0**-53
    copies = (whole + (drawn < samples.weights - whole)).astype(np.int64)
    asked = np.minimum(samples.num_turns, cut.questions_per_protein or samples.num_turns)
    return copies if (copies * asked).sum() >= steps else np.ceil(samples.weights).astype(np.int64)


@dataclass(frozen=True)
class Repeated:
    """Samples as often as an epoch sees them, and of each the number it has without repetition: int64."""

    samples: Samples
    source: np.ndarray


def repeat(samples: Samples, copies: np.ndarray) -> Repeated:
    """A copy has an id of its own, by hash of sample and copy, so that copies are shuffled apart. The first keeps it."""
    source = np.repeat(np.arange(len(copies)), copies)
    if (copies == 1).all():
        return Repeated(samples, source)
    copy = np.arange(len(source)) - (np.cumsum(copies) - copies)[source]
    ids = samples.ids[source]
    ids = np.where(copy == 0, ids, mix(ids ^ mix(copy), 6))
    num_turns = samples.num_turns[source]
    first_turn = np.concatenate(([0], np.cumsum(num_turns)))
    turn = np.repeat(samples.first_turn[source] - first_turn[:-1], num_turns) + np.arange(first_turn[-1])
    seen = Samples(ids, samples.prefix_tokens[source], first_turn, samples.turn_tokens[turn], samples.weights[source])
    return Repeated(seen, source)


@dataclass(frozen=True)
class Groups:
    """G groups as in WindowPlan, with what their parts cost. number: int64 (G,), 0, 1, .. among those of one protein;
    prefixes: int64 (G,); costs: int64 (M,), of each question."""

    sample: np.ndarray
    number: np.ndarray
    prefixes: np.ndarray
    turns: np.ndarray
    costs: np.ndarray
    turn_starts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """int64 (G,): questions of each group."""
        return np.diff(self.turn_starts)

    @property
    def tokens(self) -> np.ndarray:
        """int64 (G,)."""
        return self.prefixes + np.add.reduceat(self.costs, self.turn_starts[:-1])

    def take(self, order: np.ndarray) -> "Groups":
        sizes = self.sizes[order]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        place = np.repeat(self.turn_starts[order] - starts[:-1], sizes) + np.arange(starts[-1])
        columns = (self.sample[order], self.number[order], self.prefixes[order])
        return Groups(*columns, self.turns[place], self.costs[place], starts)

    def pieces(self, parts: Sequence[tuple[int, list[int]]]) -> "Groups":
        """Of each (group, places of some of its questions) a group."""
        groups = np.array([group for group, _ in parts], np.int64)
        starts = np.concatenate(([0], np.cumsum([len(places) for _, places in parts], dtype=np.int64)))
        within = [self.turn_starts[group] + np.array(places) for group, places in parts]
        place = np.concatenate([np.zeros(0, np.int64), *within])
        columns = (self.sample[groups], self.number[groups], self.prefixes[groups])
        return Groups(*columns, self.turns[place], self.costs[place], starts)

    def joined(self, other: "Groups") -> "Groups":
        names = ("sample", "number", "prefixes", "turns", "costs")
        columns = (np.concatenate([getattr(self, name), getattr(other, name)]) for name in names)
        return Groups(*columns, np.append(self.turn_starts[:-1], self.turn_starts[-1] + other.turn_starts))


def make_groups(samples: Samples, cut: Cut, epoch: int) -> Groups:
    """Each sample's questions, shuffled and cut into groups that fit a pack. In the order of the samples."""
    sample = np.repeat(np.arange(len(samples.ids)), samples.num_turns)
    number = np.arange(len(sample)) - samples.first_turn[sample]
    turn_hash = mix(samples.ids[sample] + number.astype(np.uint64), cut.seed, epoch, 1)
    # Shuffled within their sample, so `sample` and `number` keep their values: number now counts in the new order. One
    # key of both, because nearly sorted numbers are sorted ten times faster than by lexsort.
    bits = np.uint64(max(1, len(samples.ids).bit_length()))
    turns = np.argsort((sample.astype(np.uint64) << (np.uint64(64) - bits)) | (turn_hash >> bits), kind="stable")
    if cut.questions_per_protein is not None:
        kept = number < cut.questions_per_protein
        sample, turns = sample[kept], turns[kept]
    costs = samples.turn_tokens[turns]
    new_sample = np.diff(sample, prepend=-1) != 0
    bound = new_sample | (np.diff(pack_part(samples, cut, sample, costs, new_sample), prepend=-1) != 0)
    since_bound = np.arange(len(sample)) - np.maximum.accumulate(np.where(bound, np.arange(len(sample)), 0))
    starts = np.flatnonzero(since_bound % cut.questions_per_group == 0)
    first_of_sample = np.maximum.accumulate(np.where(new_sample[starts], np.arange(len(starts)), 0))
    return Groups(
        sample=sample[starts],
        number=np.arange(len(starts)) - first_of_sample,
        prefixes=samples.prefix_tokens[sample[starts]],
        turns=turns - samples.first_turn[sample],
        costs=costs,
        turn_starts=np.append(starts, len(sample)),
    )


def pack_part(samples: Samples, cut: Cut, sample, costs, new_sample) -> np.ndarray:
    """int64 (M,): parts of a sample's questions that each fit a pack beside their prefix.

    A part is a stretch of `room - longest + 1` tokens by where its questions begin: it may reach over its end by one
    question, and still fits.
    """
    if cut.tokens_per_pack is None:
        return np.zeros(len(sample), np.int64)
    before = np.cumsum(costs) - costs
    offset = before - before[np.maximum.accumulate(np.where(new_sample, np.arange(len(sample)), 0))]
    stretch = (cut.tokens_per_pack - samples.prefix_tokens - longest_turn(samples) + 1)[sample]
    assert (stretch > 0).all(), "survey refuses questions that fit no pack"
    return offset // stretch


def hash_groups(samples: Samples, cut: Cut, epoch: int, groups: Groups) -> np.ndarray:
    """uint64 (G,): the order of the groups in this epoch."""
    return mix(samples.ids[groups.sample] + groups.number.astype(np.uint64), cut.seed, epoch, 2)


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


def fingerprint(*parts) -> str:
    """Hash of arrays and plain values, for comparing a plan's inputs over ranks and with a checkpoint."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little"))  # else [1, 0] beside [] would be [1] beside [0]
        digest.update(data)
    return digest.hexdigest()
