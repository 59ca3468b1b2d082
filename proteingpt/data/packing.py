"""Groups of questions into packs of a bounded number of tokens, pure.

Best fit leaves holes where groups are large: with thirty questions a group, packs of 4,096 tokens come out 93 % full. So
some groups, those of the shortest proteins, are held back and split over the holes, each piece with a prefix of its own.
What that costs is known (at PDB lengths 2 % more tokens for 5 % fewer packs), and it is done only where best fit alone
stays under FULL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

FULL = 0.99
# Parts of the tokens held back for the holes, in units of the share of them that best fit leaves; all are tried.
HELD_BACK = (0.7, 0.85, 1.0)


def best_fit(sizes: Sequence[int], capacity: int) -> list[int]:
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


@dataclass(frozen=True)
class Packs:
    """number: how many. whole: of each group its pack, -1 for one that is split. pieces: (group, places of some of its
    questions, pack), which together hold each question of the split groups once."""

    number: int
    whole: list[int]
    pieces: list[tuple[int, list[int], int]]


def fill(sizes: list[int], prefixes: list[int], questions: Callable[[int], list[int]], capacity: int) -> Packs:
    """Groups into packs of at most `capacity` tokens, whole or split: the fewest packs of those tried, and of these the
    fewest tokens.

    sizes: tokens of each group; prefixes: of its prefix alone; questions(g): of each of its questions, any of which fits
    a pack with the prefix.
    """
    plain = pack_whole(sizes, capacity)
    holes = 1 - sum(sizes) / (plain.number * capacity)
    if holes <= 1 - FULL:
        return plain
    tried = [plain, *(fill_holes(sizes, prefixes, questions, capacity, part * holes) for part in HELD_BACK)]
    return min(tried, key=lambda packs: (packs.number, sum(prefixes[group] for group, _, _ in packs.pieces)))


def pack_whole(sizes: list[int], capacity: int) -> Packs:
    bins = best_fit(sizes, capacity)
    return Packs(max(bins, default=-1) + 1, bins, [])


def fill_holes(sizes, prefixes, questions, capacity: int, share: float) -> Packs:
    """Best fit of all groups but those with the shortest prefixes, `share` of the tokens, which are cut to fill what is
    left open, the largest holes first; whatever remains of them is packed by best fit."""
    reserve = shortest(prefixes, sizes, share * sum(sizes))
    held = set(reserve)
    kept = [group for group in range(len(sizes)) if group not in held]
    packed = pack_whole([sizes[group] for group in kept], capacity)
    whole, rooms = [-1] * len(sizes), [capacity] * packed.number
    for group, number in zip(kept, packed.whole):
        whole[group] = number
        rooms[number] -= sizes[group]
    pieces, group, costs, rest = [], None, [], []
    for number in sorted(range(len(rooms)), key=lambda n: -rooms[n]):
        room = rooms[number]
        while rest or reserve:
            if not rest:
                group = reserve.pop()
                costs = questions(group)
                rest = list(range(len(costs)))
            taken = choose(costs, rest, room - prefixes[group])
            if not taken:
                break
            pieces.append((group, sorted(taken), number))
            room -= prefixes[group] + sum(costs[place] for place in taken)
            rest = [place for place in rest if place not in taken]
    left = [(group, rest)] if rest else []
    left += [(other, list(range(len(questions(other))))) for other in reserve]
    more = pack_whole([prefixes[g] + sum(questions(g)[place] for place in places) for g, places in left], capacity)
    pieces += [(g, places, packed.number + number) for (g, places), number in zip(left, more.whole)]
    return Packs(packed.number + more.number, whole, pieces)


def shortest(prefixes: list[int], sizes: list[int], tokens: float) -> list[int]:
    """Groups with the shortest prefixes, of so many tokens in all; the shortest comes last."""
    chosen, held = [], 0
    for group in sorted(range(len(sizes)), key=lambda g: (prefixes[g], g)):
        if held >= tokens:
            break
        chosen.append(group)
        held += sizes[group]
    return chosen[::-1]


def choose(costs: list[int], places: list[int], room: int) -> set[int]:
    """Places of questions that fit `room` together, the longest first."""
    taken = set()
    for place in sorted(places, key=lambda p: (-costs[p], p)):
        if costs[place] <= room:
            taken.add(place)
            room -= costs[place]
    return taken
