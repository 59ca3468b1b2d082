"""The plan: which questions are in which optimizer step, and which rank computes them.

Pure, integers in and integers out. `plan_epoch` never looks at the devices, so a run is the same on any of them and
its whole data state is the step number; only `assign` knows how many ranks there are.
"""

import hashlib
from dataclasses import dataclass

import numpy as np


class PlanError(ValueError):
    """The data set and the recipe do not go together."""


@dataclass(frozen=True)
class EpochPlan:
    """G groups in the order of the epoch. A group is one protein and some of its questions.

    sample: int64 (G,) index of the protein; turns: int64 (N,) indices of its questions, all groups' end to end;
    turn_starts: int64 (G + 1,) where each group's begin; step_starts: int64 (K + 1,) first group of each step.
    """

    sample: np.ndarray
    turns: np.ndarray
    turn_starts: np.ndarray
    step_starts: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.step_starts) - 1

    def step(self, number: int) -> list[tuple[int, tuple[int, ...]]]:
        """The groups of step `number` of this epoch: [(sample, its turns), ...]."""
        groups = range(self.step_starts[number], self.step_starts[number + 1])
        return [
            (int(self.sample[g]), tuple(self.turns[self.turn_starts[g] : self.turn_starts[g + 1]].tolist()))
            for g in groups
        ]


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


def plan_epoch(
    ids: np.ndarray, num_turns: np.ndarray, *, seed: int, epoch: int, questions_per_group: int, samples_per_step: int
) -> EpochPlan:
    """Every turn of every sample once, shuffled, in groups of at most `questions_per_group`, in even steps.

    ids: uint64 (S,) from hash_keys; num_turns: int (S,). The number of steps is the same in every epoch, so the
    length of a schedule is known; each is within less than a group of the even share, so none is left over.
    Raises PlanError where there is nothing to plan.
    """
    total = int(num_turns.sum())
    if total == 0:
        raise PlanError("there is no question in the training split")
    sample = np.repeat(np.arange(len(ids)), num_turns)
    number = np.arange(total) - np.repeat(np.cumsum(num_turns) - num_turns, num_turns)
    turn_hash = mix(np.repeat(ids, num_turns) + number.astype(np.uint64), seed, epoch, 1)
    shuffled = np.lexsort((turn_hash, sample))  # questions shuffled within their protein, proteins still in order
    group_in_sample = number // questions_per_group  # `number` is 0, 1, .. within each protein in this order too
    starts = np.flatnonzero(number % questions_per_group == 0)

    group_hash = mix(ids[sample[starts]] + group_in_sample[starts].astype(np.uint64), seed, epoch, 2)
    order = np.argsort(group_hash, kind="stable")
    sizes = np.diff(np.append(starts, total))[order]
    turn_starts = np.concatenate(([0], np.cumsum(sizes)))
    position = np.repeat(starts[order] - turn_starts[:-1], sizes) + np.arange(total)
    return EpochPlan(
        sample=sample[starts[order]],
        turns=number[shuffled][position],
        turn_starts=turn_starts,
        step_starts=cut_steps(turn_starts, num_steps(num_turns, questions_per_group, samples_per_step)),
    )


def num_steps(num_turns: np.ndarray, questions_per_group: int, samples_per_step: int) -> int:
    """Steps of an epoch. Fewer than total / samples_per_step only where steps would be smaller than a group."""
    total, largest = int(num_turns.sum()), min(questions_per_group, int(num_turns.max(initial=1)))
    return max(1, min(-(-total // samples_per_step), total // largest))


def cut_steps(turn_starts: np.ndarray, steps: int) -> np.ndarray:
    """First group of each step, cutting the epoch's turns as evenly as whole groups allow. No step is empty, because
    a step's share of the turns is at least the size of the largest group (see num_steps)."""
    total = turn_starts[-1]
    step_of_group = turn_starts[:-1] * steps // total
    return np.searchsorted(step_of_group, np.arange(steps + 1))


def assign(costs: list[int], num_ranks: int) -> list[list[int]]:
    """Share a step's groups among ranks: longest first, each to the rank with the least so far.

    Returns the groups of each rank in ascending order. Where there are fewer groups than ranks, some get none.
    """
    loads, shares = [0] * num_ranks, [[] for _ in range(num_ranks)]
    for group in sorted(range(len(costs)), key=lambda g: (-costs[g], g)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        loads[rank] += costs[group]
        shares[rank].append(group)
    return [sorted(share) for share in shares]


def fingerprint(*parts) -> str:
    """Hash of arrays and plain values, for comparing a plan's inputs over ranks and with a checkpoint."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little"))  # else [1, 0] beside [] would be [1] beside [0]
        digest.update(data)
    return digest.hexdigest()
