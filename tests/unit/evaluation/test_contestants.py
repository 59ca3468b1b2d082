"""Who is asked what: the same proteins on any number of ranks, and partners that are never oneself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.evaluation.contestants import Case, choose_cases, keep_fitting, partners
from proteingpt.evaluation.predictions import EvaluationError
from proteingpt.protein import PrefixLength, Turn


class Shards:
    """What is read of a ShardSet here: the texts of its samples."""

    def __init__(self, num_turns: dict[str, int]):
        self.keys, self.num_turns = list(num_turns), num_turns
        self.num_residues = np.arange(10, 10 + len(num_turns))

    def read_text(self, i: int):
        return "It is.", tuple(Turn(f"Q{n}", f"A{n}") for n in range(self.num_turns[self.keys[i]]))


counts = st.dictionaries(st.text("abcdef0123", min_size=4, max_size=4), st.integers(0, 4), min_size=1, max_size=12)


@given(counts, st.integers(0, 5), st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_choice_depends_on_keys_and_seed_and_fewer_are_the_first_of_more(num_turns, seed, few, random):
    cases = choose_cases(Shards(num_turns), "instruct", seed, None, None)
    assert {case.key for case in cases} == {key for key, count in num_turns.items() if count}
    mixed = list(num_turns.items())
    random.shuffle(mixed)
    other = choose_cases(Shards(dict(mixed)), "instruct", seed, few, 2)
    assert [case.key for case in other] == [case.key for case in cases][:few]
    assert all(case.turns == whole.turns[:2] for case, whole in zip(other, cases))


def test_stage_align_asks_for_the_description():
    (case,) = choose_cases(Shards({"1abc": 0}), "align", 42, None, None)
    assert case.turns == (Turn("", "It is."),) and case.wanted == [("1abc", 0)]


@given(st.integers(2, 30))
def test_everyone_has_another_as_partner(num):
    cases = [Case(f"p{i}", i, 9, ()) for i in range(num)]
    other = partners(cases)
    assert sorted(case.key for case in other.values()) == sorted(other)
    assert all(key != case.key for key, case in other.items())


def test_one_protein_has_no_partner():
    with pytest.raises(EvaluationError, match="at least two proteins"):
        partners([Case("p", 0, 9, ())])


def test_what_does_not_fit_the_context_is_left_out_by_name(characters):
    """By hand: BOS and `###Human: <protein>` are 20 ids, `</protein> Why? ###Assistant: ` 31; two rows a residue and
    2 of
    each encoder; 5 new tokens."""
    prompt = Prompt(characters(), TEMPLATES["released", "instruct"], 5)
    front, question = 1 + len("###Human: <protein>"), len("</protein> Why? ###Assistant: ")
    cases = [Case(f"p{length}", 0, length, (Turn("Why?", "So."),)) for length in (10, 11)]
    context = front + 2 * (10 + 2) + question + 5
    fitting, others = keep_fitting(cases, prompt, PrefixLength(2), context, 5)
    assert [case.key for case in fitting] == ["p10"] and others == ["p11"]
    assert keep_fitting(cases, prompt, PrefixLength(1), context, 5)[1] == []  # with one encoder both fit
