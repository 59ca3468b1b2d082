"""Packing: best fit is best fit, and what is split over holes is all there, once, within its bound."""

from collections import Counter, defaultdict
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.packing import FULL, best_fit, choose, fill, fill_holes, first_of


def plain_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Largest first, each into the bin with the least room that takes it."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        able = [made for made in bins if sum(made) + size <= capacity]
        if able:
            max(able, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 130))
def test_best_fit_is_best_fit(sizes, capacity):
    """Bins of equal room are alike, so whichever of them is taken, the loads come out the same."""
    chosen = best_fit(sizes, capacity)
    loads = Counter()
    for size, number in zip(sizes, chosen, strict=True):
        loads[number] += size
    assert sorted(loads.values()) == sorted(sum(made) for made in plain_best_fit(sizes, capacity))
    assert sorted(loads) == list(range(len(loads)))


def test_best_fit_by_hand():
    # 7 | 6 | 5 beside nothing (room 3, 4) | 4 with 6 | 3 with 7 | 2: room 5 beside 5 | 2 there too.
    assert best_fit([2, 7, 6, 2, 5, 4, 3], 10) == [2, 0, 1, 2, 2, 1, 0]


# ------------------------------------------------------------------------------------------------- filling holes


@st.composite
def groups(draw):
    """(prefixes, questions of each group, capacity): a question fits with its prefix, a group fits whole."""
    prefixes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=30))
    questions = [draw(st.lists(st.integers(1, 15), min_size=1, max_size=8)) for _ in prefixes]
    largest = max(prefix + sum(costs) for prefix, costs in zip(prefixes, questions))
    return prefixes, questions, largest + draw(st.integers(0, 60))


def loads_of(packs, prefixes, questions) -> tuple[Counter, dict[int, list[int]]]:
    """(tokens of each pack, places of each group's questions), counted one by one."""
    loads, asked = Counter(), defaultdict(list)
    whole = [(group, range(len(questions[group])), number) for group, number in enumerate(packs.whole) if number >= 0]
    for group, places, number in [*whole, *packs.pieces]:
        loads[number] += prefixes[group] + sum(questions[group][place] for place in places)
        asked[group] += places
    return loads, asked


def sizes_of(prefixes, questions) -> list[int]:
    return [prefix + sum(costs) for prefix, costs in zip(prefixes, questions)]


@given(groups(), st.data())
def test_every_question_is_in_one_pack_and_no_pack_over_its_bound(given_groups, data):
    prefixes, questions, capacity = given_groups
    sizes = sizes_of(prefixes, questions)
    filled = fill(sizes, prefixes, questions.__getitem__, capacity)
    held_back = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True))
    for packs in (filled, fill_holes(sizes, prefixes, questions.__getitem__, capacity, held_back)):
        loads, asked = loads_of(packs, prefixes, questions)
        assert {group: sorted(places) for group, places in asked.items()} == {
            group: list(range(len(costs))) for group, costs in enumerate(questions)
        }
        assert sorted(loads) == list(range(packs.number)) and max(loads.values()) <= capacity


@given(groups())
def test_filling_never_takes_more_packs_and_splits_nothing_where_best_fit_is_full(given_groups):
    prefixes, questions, capacity = given_groups
    sizes = sizes_of(prefixes, questions)
    packs, plain = fill(sizes, prefixes, questions.__getitem__, capacity), best_fit(sizes, capacity)
    assert packs.number <= max(plain) + 1
    if packs.number == max(plain) + 1 or sum(sizes) >= FULL * capacity * (max(plain) + 1):
        assert packs.pieces == [] and packs.whole == plain


def test_a_hole_filled_by_hand():
    """Five groups of 60 leave 50 in each pack of 110. The sixth, of five questions of 20, has the shortest prefix, 5:
    two of its questions go into each of two holes and one into a third, and there are five packs instead of six."""
    prefixes, questions = [30] * 5 + [5], [[30]] * 5 + [[20] * 5]
    sizes = sizes_of(prefixes, questions)
    assert sizes == [60] * 5 + [105]
    packs = fill_holes(sizes, prefixes, questions.__getitem__, 110, [5])
    loads, asked = loads_of(packs, prefixes, questions)
    assert max(best_fit(sizes, 110)) + 1 == 6 and packs.number == 5 and sorted(asked[5]) == [0, 1, 2, 3, 4]
    assert sorted(loads.values()) == [60, 60, 85, 105, 105]


def test_what_is_held_back_is_as_large_as_asked():
    assert first_of([1, 3, 2, 0], [20, 10, 10, 10], 15) == [1, 3]
    assert first_of([1, 3, 2, 0], [20, 10, 10, 10], 0) == []
    assert first_of([1, 0], [20, 10], 1000) == [1, 0]


def test_questions_are_chosen_to_fill_the_room_by_hand():
    """12 + 5 is 17, where the longest first would take 13 and leave 4; the fourth is not asked for."""
    costs = [12, 13, 5, 1]
    chosen = {room: choose(costs, [0, 1, 2], room) for room in (-3, 0, 4, 5, 12, 17, 18, 25, 29, 100)}
    assert chosen == {
        -3: set(), 0: set(), 4: set(), 5: {2}, 12: {0}, 17: {0, 2}, 18: {1, 2}, 25: {1, 0}, 29: {1, 0}, 100: {0, 1, 2},
    }  # fmt: skip


@given(st.lists(st.integers(1, 60), max_size=9), st.integers(-5, 200))
def test_no_other_choice_fills_more(costs, room):
    chosen = choose(costs, list(range(len(costs))), room)
    sums = [sum(part) for size in range(len(costs) + 1) for part in combinations(costs, size)]
    assert sum(costs[place] for place in chosen) == max([total for total in sums if total <= room], default=0)
