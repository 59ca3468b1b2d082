"""Columns on disk against plain lists; and a folder of them is made once, whole, or not at all."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data import columns
from proteingpt.data.columns import Joined, Texts, made_once, pieces
from proteingpt.data.shard_format import ShardError

DTYPES = {"values": "<i4", "starts": "<i8"}
rows = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4), max_size=9)


def writing(batches: list[list[list[int]]]):
    """Each batch is rows of numbers."""

    def write(writer):
        writer.append_lengths("starts", np.zeros(0, np.int64))
        for batch in batches:
            writer.append("values", np.array([value for row in batch for value in row], np.int64))
            writer.append_lengths("starts", np.array([len(row) for row in batch], np.int64))

    return write


@given(st.lists(rows, max_size=3))
def test_what_is_written_in_batches_is_read_as_one(batches):
    whole = [row for batch in batches for row in batch]
    found = made_once(None, DTYPES, writing(batches))
    starts = found["starts"].tolist()
    assert [found["values"][a:b].tolist() for a, b in zip(starts, starts[1:])] == whole
    assert found["values"].dtype == np.int32 and starts[0] == 0 and len(starts) == len(whole) + 1


def test_a_folder_is_made_once(tmp_path):
    path, made = tmp_path / "kept", []

    def write(writer):
        made.append(1)
        writing([[[1, 2], [3]]])(writer)

    first, second = (made_once(path, DTYPES, write) for _ in range(2))
    assert made == [1] and all(np.array_equal(first[name], second[name]) for name in DTYPES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(ValueError, match="read-only"):
        first["values"][0] = 7


def test_a_disk_that_is_full_leaves_no_folder_and_the_columns_are_made_elsewhere(tmp_path, caplog):
    tried = []

    def write(writer):
        writing([[[1, 2]]])(writer)
        tried.append(1)
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, "no space left on device")

    assert made_once(tmp_path / "kept", DTYPES, write)["values"].tolist() == [1, 2]
    assert list(tmp_path.iterdir()) == [] and "cannot be kept" in caplog.text

    def fail(writer):
        raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(ShardError, match="no space left on device: make room there"):
        made_once(tmp_path / "kept", DTYPES, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_not_tried_twice(tmp_path):
    tried = []

    def write(writer):
        tried.append(1)
        raise ShardError("index train-00003.index.jsonl is missing")

    with pytest.raises(ShardError, match="train-00003"):
        made_once(tmp_path / "kept", DTYPES, write)
    assert tried == [1] and list(tmp_path.iterdir()) == []


def test_a_folder_that_another_run_finished_meanwhile_is_taken(tmp_path):
    path = tmp_path / "kept"

    def write(writer):
        writing([[[1]]])(writer)
        made_once(path, DTYPES, writing([[[2]]]))  # by a process with another number
        os.utime(path)

    number = os.getpid()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.getpid", lambda numbers=iter([number, -1]): next(numbers))
        assert made_once(path, DTYPES, write)["values"].tolist() == [2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_files_without_a_name_take_no_place_when_they_are_let_go(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = made_once(None, DTYPES, writing([[[5]]]))
    assert list(tmp_path.iterdir()) == [] and found["values"].tolist() == [5]
    mapped = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/columns-" in mapped and "(deleted)" in mapped
    del found
    assert f"{tmp_path}/columns-" not in Path("/proc/self/maps").read_text()


def test_pieces_are_all_of_it(monkeypatch):
    monkeypatch.setattr(columns, "AT_ONCE", 3)
    assert [(p.start, p.stop) for p in pieces(7)] == [(0, 3), (3, 6), (6, 7)] and list(pieces(0)) == []


@given(st.lists(st.text("abcXYZ_09", max_size=5), max_size=8), st.data())
def test_texts_read_as_a_list_does(texts, data):
    letters = np.frombuffer("".join(texts).encode(), np.uint8)
    kept = Texts(letters, np.concatenate(([0], np.cumsum([len(text) for text in texts], dtype=np.int64))))
    assert kept == texts and len(kept) == len(texts) and kept[1:3] == texts[1:3]
    assert kept != [*texts, "more"]
    for wrong in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            kept[wrong]
    if texts:
        number = data.draw(st.integers(-len(texts), len(texts) - 1))
        assert kept[np.int64(number)] == texts[number] and texts[number] in kept


arrays = st.lists(st.lists(st.integers(-9, 9), max_size=6), min_size=1, max_size=4)


@given(arrays, st.data())
def test_joined_arrays_are_read_like_one(parts, data):
    shifts = data.draw(st.lists(st.integers(0, 100), min_size=len(parts), max_size=len(parts)))
    joined = Joined([np.array(part, np.int64) for part in parts], shifts)
    whole = np.array([value + shift for part, shift in zip(parts, shifts) for value in part], np.int64)
    assert len(joined) == len(whole)
    first, last = (data.draw(st.integers(0, len(whole))) for _ in range(2))
    assert joined[first:last].tolist() == whole[first:last].tolist()
    if len(whole):
        where = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)), np.int64)
        assert joined[where].tolist() == whole[where].tolist()
        assert [int(joined[int(i)]) for i in where] == whole[where].tolist()
