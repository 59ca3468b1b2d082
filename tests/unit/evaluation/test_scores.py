"""The figures: the lift by hand, contestants that answered only some, bins, and examples."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.evaluation.metrics import exact_match
from proteingpt.evaluation.predictions import Record
from proteingpt.evaluation.scores import LENGTH_BOUNDS, About, Scoring, bin_of, score, spread

NUM = 40


def records(predict, keys=range(NUM)):
    """Two questions about each of 40 proteins: is it even (YES / NO), and how many (its number plus 3000)."""
    made = []
    for i in keys:
        even, count = ("YES" if i % 2 == 0 else "NO"), str(3000 + i)
        made += [
            Record(f"p{i:02d}", 0, "Even?", even, predict(i, even)),
            Record(f"p{i:02d}", 1, "How many?", count, predict(i, count)),
        ]
    return made


ALL = {
    "model": records(lambda i, answer: answer if i < 30 else "N/A"),  # 75 % right
    "blind": records(lambda i, answer: "YES" if answer in ("YES", "NO") else "3000"),  # 20 + 1 of 80
    "shuffled": records(lambda i, answer: "NO"),  # 20 of 80
    "chat": records(lambda i, answer: answer, keys=range(20, 40)),  # all right, of the second half only
}
ABOUT = {
    f"p{i:02d}": About(50 + 10 * i, None if i < 10 else 1.0 + i / 10, "X-ray" if i % 4 else "NMR", i / 40)
    for i in range(NUM)
}


@pytest.fixture(scope="module")
def figures():
    return score(ALL, ABOUT, Scoring(num_draws=300))


def test_the_lift_is_the_models_score_less_the_blind_ones(figures):
    headline = figures["headline"]
    assert headline["metric"] == "exact"
    assert headline["model"]["value"] == pytest.approx(60 / 80)
    assert headline["blind"]["value"] == pytest.approx(21 / 80)
    assert headline["lift"]["value"] == pytest.approx(39 / 80)
    assert headline["lift"]["low"] < 39 / 80 < headline["lift"]["high"]
    assert headline["over shuffled"]["value"] == pytest.approx(40 / 80)
    assert headline["over shuffled"]["low"] < headline["over shuffled"]["high"]


def test_who_answered_some_is_compared_on_these(figures):
    """On proteins 20 to 39 the model has half and the blind 10 of 40."""
    chat = figures["contestants"]["chat"]
    assert (chat["num_proteins"], chat["num_questions"]) == (20, 40)
    assert chat["scores"]["exact"]["value"] == 1
    assert chat["difference"]["exact"]["value"] == pytest.approx(0.5)
    assert chat["lift"]["exact"]["value"] == pytest.approx(30 / 40)


def test_questions_and_kinds(figures):
    rows = {row["question"]: row for row in figures["questions"]}
    assert {name: row["kind"] for name, row in rows.items()} == {"Even?": "yes/no", "How many?": "number"}
    even = rows["Even?"]
    assert even["model"]["exact"]["value"] == even["model"]["balanced accuracy"]["value"] == pytest.approx(0.75)
    assert even["blind"]["balanced accuracy"]["value"] == 0.5 and even["blind"]["Matthews correlation"]["value"] == 0
    assert rows["How many?"]["blind"]["mean absolute error"]["value"] == pytest.approx(np.mean(range(NUM)))
    assert rows["How many?"]["model"]["share that are numbers"]["value"] == 0.75
    assert rows["How many?"]["lift"]["value"] == pytest.approx(0.75 - 1 / 40)


def test_breakdowns_share_the_proteins_out(figures):
    for by, rows in figures["breakdowns"].items():
        assert sum(row["num_proteins"] for row in rows) == NUM, by
    lengths = figures["breakdowns"]["length"]
    assert [row["label"] for row in lengths] == [
        "< 100 residues",
        "100 - 200 residues",
        "200 - 400 residues",
        "400 - 800 residues",
    ]
    assert [row["num_proteins"] for row in lengths] == [5, 10, 20, 5]
    assert [row["model"]["value"] for row in lengths] == pytest.approx([1, 1, 0.75, 0])
    assert [row["label"] for row in figures["breakdowns"]["method"]] == ["NMR", "X-ray"]
    assert figures["breakdowns"]["resolution"][-1]["label"] == "unknown"


def test_examples_are_what_they_are_called(figures):
    good, bad = figures["examples"]["good"], figures["examples"]["bad"]
    assert good and bad and not figures["examples"]["open"]
    for one in good:
        assert exact_match(one["prediction"], one["answer"]) and not exact_match(one["blind"], one["answer"])
    for one in bad:
        assert exact_match(one["blind"], one["answer"]) and not exact_match(one["prediction"], one["answer"])


def test_empty_answers_are_counted_and_all_is_json(figures):
    assert figures["num_empty"] == 20
    json.dumps(figures, allow_nan=False)


def test_free_texts_alone_have_a_headline_too():
    """Answers of many words, scored by a metric: 1 where equal."""
    text = "a rather long answer in far more than eight words about protein {}"
    mine = [Record(f"p{i}", 0, "What does it do?", text.format(i), text.format(i if i < 5 else 0)) for i in range(10)]
    blind = [Record(r.key, 0, r.question, r.answer, text.format(0)) for r in mine]
    equal = lambda pairs: {"equal": np.array([float(a == b) for a, b in pairs])}  # noqa: E731
    found = score({"model": mine, "blind": blind}, {}, Scoring({"equal": equal}, num_draws=50))
    assert found["headline"]["metric"] == "equal, strict"
    assert found["headline"]["lift"]["value"] == pytest.approx(0.4)
    assert found["questions"] == [] and len(found["examples"]["open"]) == 8


def test_marks_that_are_missing_do_not_count_as_zero():
    marks = {(r.question, r.answer, r.prediction): (0.8 if r.key < "p10" else None) for r in ALL["model"]}
    found = score({"model": ALL["model"], "blind": ALL["blind"]}, {}, Scoring(num_draws=20, marks=marks))
    assert found["contestants"]["model"]["scores"]["judge, strict"]["value"] == pytest.approx(0.8)


@given(st.floats(0, 5000))
def test_every_value_has_one_bin(value):
    label = bin_of(value, LENGTH_BOUNDS)
    low, high = {"<": (0, 100), ">": (800, 1e9)}.get(label[0]) or map(float, label.split(" - "))
    assert low <= value < high


def test_examples_show_each_question_before_any_twice():
    found = [{"question": q, "n": n} for n, q in enumerate("aaabbc")]
    assert [one["question"] for one in spread(found)] == ["a", "b", "c", "a", "b", "a"]
