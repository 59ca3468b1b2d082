"""Predictions on disk: whole lines only, by any number of ranks, never of two settings in one place."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.evaluation.cases import Case, missing_of
from proteingpt.evaluation.predictions import EvaluationError, PredictionStore, Record
from proteingpt.protein import Turn

texts = st.text(max_size=30)
made = st.lists(st.builds(Record, st.sampled_from("abcd"), st.integers(0, 5), texts, texts, texts), max_size=12)


@given(records=made, ranks=st.integers(1, 3))
def test_what_was_appended_is_read_again_whatever_the_text(records, ranks, tmp_path_factory):
    store = PredictionStore(tmp_path_factory.mktemp("store"))
    first = {}
    for number, record in enumerate(records):
        store.append(number % ranks, [record])
        first.setdefault((record.key, record.turn), []).append(record)
    found = store.read()
    assert found.keys() == first.keys()
    assert all(record in first[key] for key, record in found.items())


RECORDS = [Record("p", turn, "Q?", "A", "é\nP") for turn in range(3)]


@pytest.mark.parametrize("num_lost", [1, 2, 30, 60])
def test_a_line_cut_by_a_kill_is_answered_again_and_harms_no_other(tmp_path, num_lost):
    store = PredictionStore(tmp_path)
    store.append(0, RECORDS)
    path = tmp_path / "rank-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-num_lost])
    case = Case("p", 0, 9, (Turn("Q?", "A"),) * 3)
    # One byte is the line's end only: the record itself is whole.
    whole = num_lost == 1
    assert len(store.read()) == (3 if whole else 2) and missing_of([case], store.read()) == ([] if whole else [case])
    store.append(0, [RECORDS[2]])
    assert list(store.read().values()) == RECORDS


def test_each_line_is_json_of_one_prediction(tmp_path):
    store = PredictionStore(tmp_path)
    store.append(0, RECORDS)
    lines = (tmp_path / "rank-00000.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["turn"] for line in lines] == [0, 1, 2]


def test_other_settings_are_refused_by_name(tmp_path):
    store = PredictionStore(tmp_path / "model")
    store.open({"model": "abc", "decoding": [300, 0.0]})
    store.append(0, RECORDS)
    store.open({"model": "abc", "decoding": [300, 0.0]})
    assert len(store.read()) == 3
    with pytest.raises(EvaluationError, match=r"decoding was \[300, 0.0\], is \[10, 0.0\].*another --out"):
        store.open({"model": "abc", "decoding": [10, 0.0]})
