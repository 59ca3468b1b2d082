"""Samples into groups of questions, in the order of an epoch: drawn, repeated by weight, shuffled and cut. Pure.

A group is some questions about one protein that share its prefix. All order comes from hashes of (seed, epoch, id), so
it depends on no library's generator and on no machine.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


class PlanError(ValueError):
    """The data set and the recipe do not go together."""


@dataclass(frozen=True)
class Samples:
    """What the plan knows of S samples and their N questions: those of a shard, or of a window.

    ids: uint64 (S,) from hash_keys; prefix_tokens: int64 (S,), what a group costs beside its questions; first_turn:
    int64 (S + 1,); turn_tokens: int64 (N,), what each question costs behind the prefix; weights: float64 (S,), how
    often a sample is seen in an epoch on average.
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


def longest_turn(samples: Samples) -> np.ndarray:
    """int64 (S,): tokens of each sample's longest question; of one without questions it means nothing."""
    return np.maximum.reduceat(np.append(samples.turn_tokens, 0), samples.first_turn[:-1])


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


def hash_keys(keys: Iterable[str]) -> np.ndarray:
    """uint64 (S,): a stable number for each sample key, so that the order does not depend on shards or positions."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)


def fingerprint(*parts) -> str:
    """Hash of arrays and plain values, for comparing a plan's inputs over ranks and with a checkpoint."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little"))  # else [1, 0] beside [] would be [1] beside [0]
        digest.update(data)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- from samples to groups


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
    """A copy has an id of its own, by hash of sample and copy, so that copies lie apart. The first keeps its own."""
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
