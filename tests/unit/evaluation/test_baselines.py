"""The blind baseline, against counts made by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.evaluation.baselines import blind_accuracy, blind_answers
from proteingpt.protein import Turn

TRAINING = [
    Turn("Helix?", "yes"),
    Turn("Helix?", "no"),
    Turn("Helix?", "no"),
    Turn("Method?", "X-ray"),
    Turn("Method?", "NMR"),
    Turn("Method?", "x-ray"),
    Turn("Count?", "2"),
]

turns = st.lists(st.builds(Turn, st.sampled_from(["a?", "b?", "c?"]), st.sampled_from(["1", "2", "3"])), min_size=1)


def test_commonest_answers_counted_by_hand():
    assert blind_answers(TRAINING) == {"Helix?": "no", "Method?": "X-ray", "Count?": "2"}


def test_spellings_are_counted_together():
    """Two of three say the same in other letters; counted as written, each answer would stand once."""
    texts = ["YES", "No.", "yes"]
    assert blind_answers([Turn("q", text) for text in texts]) == {"q": "YES"}


def test_ties_go_to_the_first_in_sorted_order():
    assert blind_answers([Turn("q", "strand"), Turn("q", "coil"), Turn("q", "helix")]) == {"q": "coil"}


def test_no_turns_have_no_blind_answers():
    assert blind_answers([]) == {}


@given(turns, st.randoms(use_true_random=False))
def test_the_order_of_training_turns_does_not_matter(training, random):
    shuffled = random.sample(training, len(training))
    assert blind_answers(shuffled) == blind_answers(training)


@given(turns)
def test_no_constant_answer_does_better_on_the_training_turns(training):
    score = blind_accuracy(training, training)
    best = Counter()
    for question in {turn.question for turn in training}:
        best[question] = Counter(turn.answer for turn in training if turn.question == question).most_common(1)[0][1]
    assert score == pytest.approx(best.total() / len(training))


def test_blind_accuracy_counted_by_hand():
    test_turns = [Turn("Helix?", "No"), Turn("Helix?", "yes"), Turn("Method?", "X-ray"), Turn("Count?", "2.0")]
    assert blind_accuracy(TRAINING, test_turns) == 3 / 4


def test_an_unseen_question_gets_the_commonest_answer_of_all():
    """`no` and `x-ray` stand twice each, and `no` sorts first."""
    assert blind_accuracy(TRAINING, [Turn("New?", "no")]) == 1.0
    assert blind_accuracy(TRAINING, [Turn("New?", "yes")]) == 0.0


def test_turns_may_be_iterators():
    assert blind_accuracy(iter(TRAINING), iter([Turn("Helix?", "no")])) == 1.0


def test_refuses_to_learn_or_score_on_nothing():
    with pytest.raises(ValueError, match="no training turns"):
        blind_accuracy([], TRAINING)
    with pytest.raises(ValueError, match="no answers to score"):
        blind_accuracy(TRAINING, [])
