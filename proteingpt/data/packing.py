"""Groups of questions into packs of a bounded number of tokens, pure.

Best fit leaves holes where groups are large: with thirty questions a group, packs of 4,096 tokens come out 93 % full.
So some groups, those of the shortest proteins, are held back and split over the holes, each piece with a prefix of its
own. What that costs is known (at PDB lengths 2 % more tokens for 5 % fewer packs), so it is done only where best fit
alone stays under FULL, and with as little held back as fills the packs.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

FULL = 0.99
# Parts of the tokens held back for the holes, in units of the share of them that best fit leaves, as they are tried.
HELD_BACK = (0.75, 0.85)


def best_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """The bin of each item: largest first, each into the fullest bin that still takes it.

    Open bins are found by the bits of one integer, bit r standing for bins with room r, so that an item costs a shift.
    """
    bins, count = [0] * len(sizes), 0
    with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0
    for item in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[item]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            alike = with_room[room]
            chosen = alike.pop()
            if not alike:
                rooms ^= 1 << room
        else:
            room, chosen, count = capacity, count, count + 1
        bins[item] = chosen
        if room > size:
            left = with_room[room - size]
            if not left:
                rooms |= 1 << (room - size)
            left.append(chosen)
    return bins


@dataclass(frozen=True)
class Packs:
    """number: how many. whole: of each group its pack, -1 for one that is split. pieces: (group, places of some of its
    questions, pack), which together hold each question of the split groups once."""

    number: int
    whole: list[int]
    pieces: list[tuple[int, list[int], int]]


def fill(sizes: list[int], prefixes: list[int], questions: Callable[[int], list[int]], capacity: int) -> Packs:
    """Groups into packs of at most `capacity` tokens: whole where that fills them, or with as few split as fill them;
    if nothing does, the fewest packs of those tried.

    sizes: tokens of each group; prefixes: of its prefix alone; questions(g): of each of its questions, any of which
    fits a pack with the prefix.
    """
    tried, tokens = [pack_whole(sizes, capacity)], sum(sizes)
    holes = 1 - tokens / (tried[0].number * capacity)
    by_prefix = sorted(range(len(sizes)), key=prefixes.__getitem__)
    for part in HELD_BACK:
        if tokens >= FULL * tried[-1].number * capacity:
            break
        held_back = first_of(by_prefix, sizes, part * holes * sum(sizes))
        tried.append(fill_holes(sizes, prefixes, questions, capacity, held_back))
        # A group that is split has a prefix in each of its pieces.
        more = sum(prefixes[group] for group, _, _ in tried[-1].pieces) - sum(prefixes[group] for group in held_back)
        tokens = sum(sizes) + more
    return min(tried, key=lambda packs: packs.number)


def pack_whole(sizes: list[int], capacity: int) -> Packs:
    bins = best_fit(sizes, capacity)
    return Packs(max(bins, default=-1) + 1, bins, [])


def fill_holes(sizes, prefixes, questions, capacity: int, held_back: list[int]) -> Packs:
    """Best fit of all groups but those held back, which are cut to fill what is left open, the largest holes first;
    whatever remains of them is packed by best fit."""
    reserve, held = held_back[::-1], set(held_back)
    kept = [group for group in range(len(sizes)) if group not in held]
    packed = pack_whole([sizes[group] for group in kept], capacity)
    whole, rooms = [-1] * len(sizes), [capacity] * packed.number
    for group, number in zip(kept, packed.whole):
        whole[group] = number
        rooms[number] -= sizes[group]
    pieces, group, costs, rest = [], None, [], []
    for number in sorted(range(len(rooms)), key=rooms.__getitem__, reverse=True):
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


def first_of(groups: list[int], sizes: list[int], tokens: float) -> list[int]:
    """The first of these groups that have so many tokens together."""
    before = accumulate((sizes[group] for group in groups), initial=0)
    return [group for group, held in zip(groups, before) if held < tokens]


def choose(costs: list[int], places: list[int], room: int) -> set[int]:
    """Places of the questions that together fill `room` best. Bit n of an integer stands for a sum n."""
    if room <= 0:
        return set()
    sums, without = 1, []
    for place in places:
        without.append(sums)
        sums |= sums << costs[place]
    left, taken = (sums & ((2 << room) - 1)).bit_length() - 1, set()
    for place, others in zip(reversed(places), reversed(without)):
        if not others >> left & 1:
            taken.add(place)
            left -= costs[place]
    return taken
