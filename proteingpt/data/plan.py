"""The plan: which questions are in which optimizer step, in which packs, and which rank computes them.

Pure, integers in and integers out. `plan_epoch` never looks at the devices: groups, packs and steps are the same on any
of them, so a run's whole data state is the step number. Only `assign` knows the ranks: it hands whole packs to them,
so a pack has the same bytes wherever it runs.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

# Groups packed together. More would mix an epoch better and fill packs no better: at PDB lengths and 4,096 tokens they are
# filled to 99 % by groups of up to 4 questions, to 93 % by groups of 30, which read a protein fewer times.
WINDOW = 4096


class PlanError(ValueError):
    """The data set and the recipe do not go together."""


@dataclass(frozen=True)
class Samples:
    """What the plan knows of a split's S samples and their N questions.

    ids: uint64 (S,) from hash_keys; prefix_tokens: int64 (S,), what a group costs beside its questions; first_turn:
    int64 (S + 1,); turn_tokens: int64 (N,), what each question costs behind the prefix; shards: int64 (S,), where each
    sample lies, for reading an epoch in windows of shards.
    """

    ids: np.ndarray
    prefix_tokens: np.ndarray
    first_turn: np.ndarray
    turn_tokens: np.ndarray
    shards: np.ndarray

    @property
    def num_turns(self) -> np.ndarray:
        return np.diff(self.first_turn)


@dataclass(frozen=True)
class Cut:
    """The recipe's part of the plan. A step is `samples_per_step` questions, or `tokens_per_step` tokens; one is None.

    questions_per_group: that share one prefix, at most. questions_per_protein: drawn anew in each epoch, None for all.
    tokens_per_pack: a pack's bound, None for one group a pack. shards_per_window: shards open at a time, None for all.
    """

    seed: int
    questions_per_group: int
    samples_per_step: int | None = None
    tokens_per_step: int | None = None
    tokens_per_pack: int | None = None
    questions_per_protein: int | None = None
    shards_per_window: int | None = None


@dataclass(frozen=True)
class EpochPlan:
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
        """The packs of step `number` of this epoch, each a list of groups (sample, its turns)."""
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


def hash_keys(keys: list[str]) -> np.ndarray:
    """uint64 (S,): a stable number for each sample key, so that the order does not depend on shards or positions."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def plan_epoch(samples: Samples, cut: Cut, epoch: int) -> EpochPlan:
    """Every question once (or questions_per_protein of each sample's), shuffled, in groups, packs and even steps.

    The number of steps is the same in every epoch, so the length of a schedule is known beforehand. PlanError where
    there is nothing to plan, or a question fits no pack.
    """
    steps = num_steps(samples, cut)
    groups = make_groups(samples, cut, epoch)
    shard_window = window_of_shards(samples, cut, epoch)[samples.shards[groups.sample]]
    order = np.lexsort((hash_groups(samples, cut, epoch, groups), shard_window))
    groups, shard_window = groups.take(order), shard_window[order]
    # A pack of two windows would keep the shards of both open.
    if cut.tokens_per_step is None:
        step_of_group = cut_evenly(groups.sizes, steps)
        pack_of_group = pack(groups.tokens, cut.tokens_per_pack, runs(step_of_group, shard_window))
    else:
        place = np.arange(len(order)) - np.searchsorted(shard_window, shard_window)
        window = runs(shard_window, place // WINDOW)
        pack_of_group = shuffle_packs(pack(groups.tokens, cut.tokens_per_pack, window), window, cut.seed, epoch)
    by_pack = np.argsort(pack_of_group, kind="stable")
    pack_starts = np.append(np.flatnonzero(np.diff(pack_of_group[by_pack], prepend=-1)), len(by_pack))
    if cut.tokens_per_step is None:
        step_of_pack = step_of_group[by_pack][pack_starts[:-1]]
    else:
        step_of_pack = cut_evenly(np.ones(len(pack_starts) - 1, np.int64), steps)
    groups = groups.take(by_pack)
    step_starts = np.searchsorted(step_of_pack, np.arange(steps + 1))
    return EpochPlan(groups.sample, groups.turns, groups.turn_starts, groups.tokens, pack_starts, step_starts)


@dataclass(frozen=True)
class Groups:
    """G groups as in EpochPlan, and `number`: int64 (G,), 0, 1, .. among those of one protein."""

    sample: np.ndarray
    number: np.ndarray
    turns: np.ndarray
    turn_starts: np.ndarray
    tokens: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """int64 (G,): questions of each group."""
        return np.diff(self.turn_starts)

    def take(self, order: np.ndarray) -> "Groups":
        sizes = self.sizes[order]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        position = np.repeat(self.turn_starts[order] - starts[:-1], sizes) + np.arange(starts[-1])
        return Groups(self.sample[order], self.number[order], self.turns[position], starts, self.tokens[order])


def make_groups(samples: Samples, cut: Cut, epoch: int) -> Groups:
    """Each sample's questions, shuffled and cut into groups that fit a pack. In the order of the samples."""
    sample = np.repeat(np.arange(len(samples.ids)), samples.num_turns)
    number = np.arange(len(sample)) - samples.first_turn[sample]
    turn_hash = mix(samples.ids[sample] + number.astype(np.uint64), cut.seed, epoch, 1)
    # Shuffled within their sample, so `sample` and `number` keep their values: number now counts in the new order.
    turns = np.lexsort((turn_hash, sample))
    if cut.questions_per_protein is not None:
        kept = number < cut.questions_per_protein
        sample, number, turns = sample[kept], number[kept], turns[kept]
    costs = samples.turn_tokens[turns]
    new_sample = np.diff(sample, prepend=-1) != 0
    bound = new_sample | (np.diff(pack_part(samples, cut, sample, costs, new_sample), prepend=-1) != 0)
    since_bound = np.arange(len(sample)) - np.maximum.accumulate(np.where(bound, np.arange(len(sample)), 0))
    starts = np.flatnonzero(since_bound % cut.questions_per_group == 0)
    tokens = samples.prefix_tokens[sample[starts]] + np.add.reduceat(costs, starts)
    first_of_sample = np.maximum.accumulate(np.where(new_sample[starts], np.arange(len(starts)), 0))
    turn_starts = np.append(starts, len(sample))
    number_of_turn = turns - samples.first_turn[sample]
    return Groups(sample[starts], np.arange(len(starts)) - first_of_sample, number_of_turn, turn_starts, tokens)


def pack_part(samples: Samples, cut: Cut, sample, costs, new_sample) -> np.ndarray:
    """int64 (M,): parts of a sample's questions that each fit a pack beside their prefix.

    A part is a stretch of `room - longest + 1` tokens by where its questions begin: it may reach over its end by one
    question, and still fits.
    """
    if cut.tokens_per_pack is None:
        return np.zeros(len(sample), np.int64)
    before = np.cumsum(costs) - costs
    offset = before - before[np.maximum.accumulate(np.where(new_sample, np.arange(len(sample)), 0))]
    # Of all questions, not only those that this epoch drew: what does not fit is said before the run begins.
    longest = np.maximum.reduceat(np.append(samples.turn_tokens, 0), samples.first_turn[:-1])
    stretch = (cut.tokens_per_pack - samples.prefix_tokens - longest + 1)[sample]
    if (stretch <= 0).any():
        worst = int(sample[np.argmin(stretch)])
        raise PlanError(
            f"tokens_per_pack is {cut.tokens_per_pack}, but a protein takes {samples.prefix_tokens[worst]} tokens and "
            f"its longest question {longest[worst]}: raise tokens_per_pack or lower data.max_residues"
        )
    return offset // stretch


def hash_groups(samples: Samples, cut: Cut, epoch: int, groups: Groups) -> np.ndarray:
    """uint64 (G,): the order of the groups in this epoch."""
    return mix(samples.ids[groups.sample] + groups.number.astype(np.uint64), cut.seed, epoch, 2)


def window_of_shards(samples: Samples, cut: Cut, epoch: int) -> np.ndarray:
    """int64: the window that each shard is read in. Shards take their turns by hash, anew in each epoch."""
    num_shards = int(samples.shards.max(initial=0)) + 1
    place = np.empty(num_shards, np.int64)
    place[np.argsort(mix(np.arange(num_shards), cut.seed, epoch, 3), kind="stable")] = np.arange(num_shards)
    return place // (cut.shards_per_window or num_shards)


def runs(*keys: np.ndarray) -> np.ndarray:
    """int64 (N,): 0, 0, .., 1, .. counting the stretches in which all keys stay the same."""
    return np.cumsum(np.logical_or.reduce([np.diff(key, prepend=key[:1]) != 0 for key in keys]))


def num_steps(samples: Samples, cut: Cut) -> int:
    """Steps of an epoch, from sizes alone. Fewer than the recipe's share asks for only where steps would be smaller
    than a group or a pack, so that none is empty."""
    taken = np.minimum(samples.num_turns, cut.questions_per_protein or samples.num_turns)
    total = int(taken.sum())
    if total == 0:
        raise PlanError("there is no question in the training split")
    if cut.tokens_per_step is None:
        largest = min(cut.questions_per_group, int(taken.max()))
        return max(1, min(-(-total // cut.samples_per_step), total // largest))
    sums = np.add.reduceat(np.append(samples.turn_tokens, 0), samples.first_turn[:-1]) * (samples.num_turns > 0)
    expected = sums * taken / np.maximum(1, samples.num_turns)
    tokens = (samples.prefix_tokens * -(-taken // cut.questions_per_group) + expected).sum()
    # So many packs any draw fills, and each step has one at least.
    fewest_packs = -(-fewest_tokens(samples, cut) // cut.tokens_per_pack)
    return max(1, min(round(tokens / cut.tokens_per_step), fewest_packs))


def fewest_tokens(samples: Samples, cut: Cut) -> int:
    """Tokens of an epoch that draws the shortest questions of each sample."""
    taken, costs = samples.num_turns, samples.turn_tokens
    if cut.questions_per_protein is not None:
        taken = np.minimum(taken, cut.questions_per_protein)
        sample = np.repeat(np.arange(len(samples.ids)), samples.num_turns)
        rank = np.arange(len(sample)) - samples.first_turn[sample]
        costs = costs[np.lexsort((costs, sample))[rank < cut.questions_per_protein]]
    return int((samples.prefix_tokens * -(-taken // cut.questions_per_group)).sum() + costs.sum())


def cut_evenly(sizes: np.ndarray, parts: int) -> np.ndarray:
    """The part, 0 .. parts - 1, of each item, so that all parts hold the same size up to one item. None is empty where
    no item is larger than a part's share."""
    before = np.cumsum(sizes) - sizes
    return before * parts // sizes.sum()


def pack(tokens: np.ndarray, capacity: int | None, window: np.ndarray) -> np.ndarray:
    """int64 (G,): the pack of each group, packed by best fit within each window (ascending). Packs are numbered in
    the order of the windows. Without a capacity each group is a pack."""
    if capacity is None:
        return np.arange(len(tokens))
    packs, count = np.empty(len(tokens), np.int64), 0
    for part in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(window)) + 1):
        packs[part] = np.array(best_fit(tokens[part].tolist(), capacity)) + count
        count = int(packs[part].max()) + 1
    return packs


def best_fit(sizes: list[int], capacity: int) -> list[int]:
    """The bin of each item: largest first, each into the fullest bin that still takes it.

    Open bins are found by the bits of one integer, bit r standing for bins with room r, so that an item costs a shift.
    """
    bins, count = [0] * len(sizes), 0
    with_room: dict[int, list[int]] = {}
    rooms = 0
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen, count = capacity, count, count + 1
        bins[item] = chosen
        if room > size:
            with_room.setdefault(room - size, []).append(chosen)
            rooms |= 1 << (room - size)
    return bins


def shuffle_packs(pack_of_group: np.ndarray, window: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Renumber the packs within each window by hash: best fit makes them from large groups to small."""
    _, first = np.unique(pack_of_group, return_index=True)
    order = np.lexsort((mix(np.arange(len(first)), seed, epoch, 4), window[first]))
    place = np.empty(len(first), np.int64)
    place[order] = np.arange(len(first))
    return place[pack_of_group]


# ------------------------------------------------------------------------------------------------ who computes what


def assign(
    tokens: list[int], speeds: list[float], capacities: list[int | None] | None = None, equal_counts: bool = False
) -> list[list[list[int]]]:
    """Share a step's packs among ranks so that all finish together.

    tokens: of each pack. speeds: tokens per second of each rank, in any unit. capacities: tokens that a rank's forward
    holds, so that one with room runs several packs in one; None: one pack a forward, whatever its size. equal_counts:
    as many forwards on every rank, empty ones among them (ZeRO 3, where each is a collective).
    Returns for each rank its forwards, each the packs in it, ascending. PlanError where a pack fits no rank.
    """
    num_ranks = len(speeds)
    limits = capacities or [None] * num_ranks
    loads, shares = [0] * num_ranks, [[] for _ in range(num_ranks)]
    for index in sorted(range(len(tokens)), key=lambda p: (-tokens[p], p)):
        able = [r for r in range(num_ranks) if limits[r] is None or limits[r] >= tokens[index]]
        if not able:
            raise PlanError(
                f"a pack of {tokens[index]} tokens fits no rank (capacities {capacities}): lower tokens_per_pack"
            )
        rank = min(able, key=lambda r: ((loads[r] + tokens[index]) / speeds[r], r))
        loads[rank] += tokens[index]
        shares[rank].append(index)
    forwards = [fuse(sorted(share), tokens, limit) for share, limit in zip(shares, limits)]
    if equal_counts:
        most = max(len(f) for f in forwards)
        forwards = [f + [[]] * (most - len(f)) for f in forwards]
    return forwards


def fuse(packs: list[int], tokens: list[int], limit: int | None) -> list[list[int]]:
    """Consecutive packs joined into forwards of at most `limit` tokens; None: each on its own."""
    if limit is None:
        return [[p] for p in packs]
    forwards: list[list[int]] = []
    room = 0
    for p in packs:
        if tokens[p] > room:
            forwards.append([])
            room = limit
        forwards[-1].append(p)
        room -= tokens[p]
    return forwards


def efficiency(num_packs: int, speeds: list[float]) -> float:
    """Share of the ranks' summed speed that a step of `num_packs` equal packs reaches: ideal time / slowest rank's."""
    shares = assign([1] * num_packs, speeds)
    slowest = max(sum(len(f) for f in share) / speed for share, speed in zip(shares, speeds))
    return num_packs / sum(speeds) / slowest


def better_counts(num_packs: int, speeds: list[float], wanted: float = 0.97) -> list[int]:
    """Numbers of packs near `num_packs` (half to double) that reach `wanted`, nearest first. Found by trying: the
    efficiency is not monotone in the number of packs."""
    near = sorted(range(max(1, num_packs // 2), 2 * num_packs + 1), key=lambda n: (abs(n - num_packs), n))
    return [n for n in near if efficiency(n, speeds) >= wanted]


def fingerprint(*parts) -> str:
    """Hash of arrays and plain values, for comparing a plan's inputs over ranks and with a checkpoint."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little"))  # else [1, 0] beside [] would be [1] beside [0]
        digest.update(data)
    return digest.hexdigest()
