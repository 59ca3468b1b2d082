"""Closed questions: which they are, of what kind, and scores that are counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.evaluation.closed import (
    closed_questions,
    closed_statistics,
    kind_of,
    make_question,
    make_questions,
    question_statistics,
)
from proteingpt.evaluation.intervals import Interval, sample
from proteingpt.evaluation.metrics import accuracy
from proteingpt.evaluation.predictions import Record


def records(question: str, *answers_and_predictions, first: int = 0):
    return [Record(f"p{i}", 0, question, a, p) for i, (a, p) in enumerate(answers_and_predictions, first)]


def at_estimate(statistics, num_proteins):
    return {name: statistic(np.ones((1, num_proteins)))[0] for name, statistic in statistics.items()}


@pytest.mark.parametrize(
    "answers, kind",
    [
        (["YES", "no", "Yes."], "yes/no"),
        (["YES"], "yes/no"),
        (["1997", "2012"], "year"),
        (["1997", "3000"], "number"),
        (["0", "1.5", "1,204"], "number"),
        (["X-ray", "NMR", "X-ray"], "category"),
        (["3", "three"], "category"),
        ([f"name {i}" for i in range(51)], "text"),
    ],
)
def test_the_kind_is_read_off_the_answers(answers, kind):
    assert kind_of(answers) == kind


def test_closed_is_what_many_are_asked_and_few_words_answer():
    long = "this answer has far more than eight words in it, as an open one has"
    asked = [
        *records("Is it large?", *[("YES", "NO")] * 60),
        *records("What does it do?", *[(long, long)] * 60),
        *records("What is special about this one?", ("Its loop.", "x")),
        *records("", *[("short", "x")] * 60),  # a description is no question
    ]
    assert closed_questions(asked) == {"Is it large?"}


def test_scores_of_a_case_counted_by_hand():
    """Three questions about four proteins. Yes/no: 3 of 4 right; recalls 2/3 and 1, so balanced 5/6; category: one
    class only, no balanced accuracy; number: exact 1 of 3, within 5 % 2 of 3, mean error of the two numbers 4."""
    asked = [
        *records("flag", ("YES", "yes"), ("YES", "YES"), ("YES", "no"), ("NO", "NO")),
        *records("class", ("X-ray", "X-ray"), ("X-ray", "NMR")),
        *records("count", ("100", "100.0"), ("200", "208"), ("300", "many")),
    ]
    kinds = {"flag": "yes/no", "class": "category", "count": "number"}
    place_of = {f"p{i}": i for i in range(4)}
    questions = make_questions(asked, kinds, place_of, tolerance=0.05)
    found = at_estimate(closed_statistics(questions), 4)
    assert found == {
        "exact": pytest.approx(5 / 9),
        "exact yes/no": pytest.approx(3 / 4),
        "exact category": pytest.approx(1 / 2),
        "exact number": pytest.approx(1 / 3),
        "number within tolerance": pytest.approx(2 / 3),
        "balanced accuracy": pytest.approx(5 / 6),
        "Matthews correlation": pytest.approx((2 * 1 - 0) / np.sqrt(3 * 1 * 2 * 2)),
    }
    count = at_estimate(question_statistics(questions[2]), 4)
    assert count["mean absolute error"] == pytest.approx(4)
    assert count["share that are numbers"] == pytest.approx(2 / 3)


forms = st.sampled_from(["YES", "NO", "maybe"])


@given(st.lists(st.tuples(st.sampled_from(["YES", "NO"]), forms), min_size=1, max_size=12), st.data())
def test_a_weight_counts_a_protein_so_often(pairs, data):
    """Weights of the bootstrap are copies of the records."""
    asked = records("flag", *pairs)
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(pairs), max_size=len(pairs)).filter(any))
    place_of = {record.key: i for i, record in enumerate(asked)}
    question = make_question("flag", "yes/no", asked, place_of, 0.05)
    weighted = closed_statistics([question])["exact"](np.array([counts], float))[0]
    copies = [record for record, count in zip(asked, counts, strict=True) for _ in range(count)]
    assert weighted == pytest.approx(accuracy([r.prediction for r in copies], [r.answer for r in copies]))
    confusion = question.confusion(np.array([counts], float))[0]
    assert confusion.sum() == len(copies) and np.trace(confusion) == pytest.approx(weighted * len(copies))


def test_nothing_left_to_score_is_not_a_zero():
    question = make_question(
        "flag", "yes/no", records("flag", ("YES", "YES"), ("NO", "NO")), {"p0": 0, "p1": 1, "p2": 2}, 0
    )
    assert np.isnan(closed_statistics([question])["exact"](np.array([[0.0, 0.0, 5.0]]))[0])


def test_the_interval_of_a_balanced_accuracy_holds_it_though_answers_are_rare():
    """12 classes, ten of one protein each, all of these wrong: (1 + 1 + 0 * 10) / 12. In a resample a third of them
    would be missing, and every draw would lie above the estimate."""
    rare = [(f"rare {i}", "often") for i in range(10)]
    asked = records("class", *[("often", "often")] * 20, *[("seldom", "seldom")] * 5, *rare)
    question = make_question("class", "category", asked, {f"p{i}": i for i in range(35)}, 0.05)
    drawn = sample(closed_statistics([question]), 35, seed=1, num_draws=200)
    interval = Interval.of(drawn["balanced accuracy"])
    assert interval.value == pytest.approx(2 / 12)
    assert interval.low - 1e-9 <= interval.value <= interval.high + 1e-9
