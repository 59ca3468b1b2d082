"""Who computes what: a step's packs shared out among ranks of unlike speed and room, and how well that can be done.

Whole packs are handed over, so that a pack has the same bytes wherever it runs. So few packs cannot be shared out
evenly: `best_count` looks for a number that can.
"""

from collections.abc import Sequence

import numpy as np

from proteingpt.data.plan import PlanError

# Share of the ranks' summed speed that a step should reach: finish times within 3 % of each other.
WANTED = 0.97


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
    room = np.array([np.inf if limit is None else limit for limit in limits])
    rates, loads, shares = np.array(speeds, np.float64), np.zeros(num_ranks), [[] for _ in range(num_ranks)]
    for index in sorted(range(len(tokens)), key=lambda p: (-tokens[p], p)):
        size = tokens[index]
        if size > room.max():
            raise PlanError(f"a pack of {size} tokens fits no rank (capacities {capacities}): lower tokens_per_pack")
        rank = int(np.argmin(np.where(room >= size, (loads + size) / rates, np.inf)))
        loads[rank] += size
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


def reached(tokens: list[int], speeds: list[float], capacities: list[int | None] | None = None) -> float:
    """Share of the ranks' summed speed that a step reaches, whose packs have so many tokens: ideal time / slowest
    rank's."""
    loads = [sum(tokens[p] for forward in share for p in forward) for share in assign(tokens, speeds, capacities)]
    return sum(tokens) / sum(speeds) / max(load / speed for load, speed in zip(loads, speeds))


def efficiencies(most: int, speeds: Sequence[float]) -> np.ndarray:
    """float64 (most,): what steps of 1, 2, .. `most` equal packs reach, by the same sharing out.

    Each pack goes where it ends first, so the n-th to end does so at the n-th smallest of k / speed, k = 1, 2, .. of
    each rank.
    """
    # Nobody ends later than with (most + ranks) / total work behind all.
    ends = [np.arange(1, int((most + len(speeds)) * speed / sum(speeds)) + 2) / speed for speed in speeds]
    last = np.sort(np.concatenate(ends))[:most]
    return np.arange(1, most + 1) / sum(speeds) / last


def efficiency(num_packs: int, speeds: list[float]) -> float:
    """Share of the ranks' summed speed that a step of `num_packs` equal packs reaches."""
    return float(efficiencies(num_packs, speeds)[-1])


def better_counts(num_packs: int, speeds: list[float], wanted: float = WANTED) -> list[int]:
    """Numbers of packs near `num_packs` (half to double) that reach `wanted`, nearest first. Found by trying: the
    efficiency is not monotone in the number of packs."""
    found = efficiencies(2 * num_packs, speeds)
    near = sorted(range(max(1, num_packs // 2), 2 * num_packs + 1), key=lambda n: (abs(n - num_packs), n))
    return [n for n in near if found[n - 1] >= wanted]


def best_count(num_packs: int, speeds: list[float], wanted: float = WANTED) -> int:
    """The number of packs nearest to `num_packs` that reaches `wanted`; where none near does, the smallest that does of
    up to 64 for each rank, or else the best of those."""
    near = better_counts(num_packs, speeds, wanted)
    if near:
        return near[0]
    found = efficiencies(max(2 * num_packs, 64 * len(speeds)), speeds)
    return int(np.argmax(found >= wanted) if found.max() >= wanted else np.argmax(found)) + 1


def balance_line(
    steps: list[list[int]], speeds: list[float], capacities: list[int | None], per_step: tuple[str, int]
) -> str:
    """One line for people: packs a step, the share of the summed speed that these steps reach on average, and where
    that is under WANTED, what would reach it. steps: tokens of each pack of each step; per_step: the setting and its
    value."""
    num_packs = sum(map(len, steps)) / len(steps)
    share = sum(reached(tokens, speeds, capacities) for tokens in steps) / len(steps)
    line = f"{num_packs:.4g} packs a step on {len(speeds)} rank(s): {share:.1%} of their summed speed"
    if share >= WANTED:
        return line
    # A little more than is wanted: some steps have a pack more or less.
    better = best_count(round(num_packs), speeds, wanted=(1 + 2 * WANTED) / 3)
    name, value = per_step
    return (
        f"{line}; {name} {round(value * better / num_packs)} instead of {value} would make about {better} packs and "
        f"reach {efficiency(better, speeds):.1%}"
    )
