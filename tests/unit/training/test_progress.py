"""RUN/progress.json: whole at every moment, small, and no end of a training."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.training import progress
from proteingpt.training.progress import NAME, ProgressFile, duration, finite, read_object, read_progress_file

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), VALUES))
def test_whatever_is_noted_is_json_that_any_reader_reads(values):
    text = json.dumps(finite(values), allow_nan=False)
    assert json.loads(text).keys() == values.keys()


def test_what_json_has_not_becomes_null():
    assert finite({"a": [1, 2.0, math.nan, -math.inf], "b": (math.inf, True)}) == {
        "a": [1, 2.0, None, None],
        "b": [None, True],
    }


def test_it_is_written_at_most_once_a_second_unless_asked_to(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    made = ProgressFile(tmp_path, {"stages": ["align"]})
    for seconds, ask, step, written in (
        (0, False, 1, 1),
        (0.5, False, 2, 1),
        (0.9, True, 3, 3),
        (1.5, False, 4, 3),
        (2, False, 5, 5),
    ):
        now[0] = seconds
        made.note(ask, step=step)
        assert read_progress_file(tmp_path) == {"stages": ["align"], "step": written}
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_disk_that_takes_nothing_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    made = ProgressFile(tmp_path / "file", {})  # no directory
    for step in range(3):
        made.note(True, step=step)
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000, b'{"a": 1'])
def test_what_is_torn_or_another_file_is_nothing(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    assert read_progress_file(tmp_path) == {}
    assert read_object(tmp_path / "missing") == {} == read_object(tmp_path)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 00 s"),
        (75.2, "1 min 15 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90_061, "25 h 01 min"),
    ],
)
def test_durations_by_hand(seconds, text):
    assert duration(seconds) == text
