"""Which held-out proteins are asked what: always the same ones."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.plan import hash_keys
from proteingpt.evaluation.held_out import choose

KEYS = [f"{number}abc_A" for number in range(40)]


def split(keys: list[str], num_turns: list[int]):
    """What `choose` reads of a StageData."""
    return SimpleNamespace(ids=hash_keys(keys), num_turns=np.array(num_turns))


counts = st.lists(st.integers(0, 9), min_size=len(KEYS), max_size=len(KEYS))


@given(counts, st.integers(0, 1000), st.integers(1, 50), st.integers(1, 12))
def test_as_many_proteins_as_asked_for_each_with_its_first_questions(turns, seed, num_proteins, questions):
    chosen = choose(split(KEYS, turns), seed, num_proteins, questions)
    samples = [sample for sample, _ in chosen]
    assert len(set(samples)) == len(samples) == min(num_proteins, sum(count > 0 for count in turns))
    for sample, numbers in chosen:
        assert numbers == tuple(range(min(turns[sample], questions))) and numbers


@given(counts, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_how_shards_list_the_samples(turns, seed, random):
    order = list(range(len(KEYS)))
    random.shuffle(order)
    moved = choose(split([KEYS[i] for i in order], [turns[i] for i in order]), seed, 10, 5)
    assert [(order[sample], numbers) for sample, numbers in moved] == choose(split(KEYS, turns), seed, 10, 5)


def test_fewer_proteins_are_the_first_of_more():
    """So scores of a short evaluation are of the same proteins as those of a long one."""
    data = split(KEYS, [3] * len(KEYS))
    assert choose(data, 42, 20, 5)[:7] == choose(data, 42, 7, 5)


def test_the_seed_decides():
    data = split(KEYS, [3] * len(KEYS))
    assert {s for s, _ in choose(data, 1, 10, 5)} != {s for s, _ in choose(data, 2, 10, 5)}


def test_nothing_to_ask_is_an_empty_choice():
    assert choose(split(KEYS, [0] * len(KEYS)), 42, 10, 5) == []
