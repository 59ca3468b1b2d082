"""What an unfinished build keeps: it comes back as it went in, and only for the file and options it was made from."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from proteingpt.data.entries import Outcome, encode_outcome
from proteingpt.data.filters import Filters, Skip
from proteingpt.data.pieces import (
    LOCK_NAME,
    Busy,
    continues,
    holding,
    job_key,
    load_pieces,
    note_reading,
    open_work,
    read_stored,
    take_notes,
    write_piece,
)
from proteingpt.data.shards import encode_sample
from proteingpt.data.sources import Job, Text
from proteingpt.protein import Facts, Protein, Sample, Turn


def sample(entry: str, length: int) -> Sample:
    backbone = np.arange(length * 9, dtype=np.float32).reshape(length, 3, 3)
    return Sample(Protein(entry, "A", "ACDEFG"[:length], backbone), "About it.", (Turn("Q?", "A."),), {})


@pytest.fixture
def work(tmp_path):
    return open_work(tmp_path, {"seed": 1})


def test_samples_and_skips_come_back_as_they_went_in(work):
    samples = (sample("1abc", 5), sample("1abd", 3))
    skip = Skip("2.cif", "2abc", "A", "too short", "2 residues")
    outcomes = [Outcome("1.cif", "1abc", samples, (), "2001-02-03"), Outcome("2.cif", "2abc", (), (skip,))]
    parsed = write_piece(work, [encode_outcome(str(n), o, {"A": "1"}) for n, o in enumerate(outcomes)])
    found = load_pieces(work, ["0", "1"])
    assert [found["0"], found["1"]] == parsed
    assert found["0"].date == "2001-02-03" and found["1"].skips == (skip,)
    for stored, made in zip(found["0"].samples, samples):
        assert read_stored(work, stored) == encode_sample(made) and stored.entity == "1"


def test_only_what_is_wanted_is_kept(work):
    for key in ("old", "new"):
        write_piece(work, [encode_outcome(key, Outcome("1.cif", "1abc", (sample("1abc", 4),)), {})])
    assert set(load_pieces(work, ["new", "other"])) == {"new"}
    assert len(list(work.glob("*.data"))) == 1


def test_what_could_not_be_read_for_no_fault_of_the_file_is_read_again(work):
    """And what lies with it in the same piece is not."""
    reasons = ["read error", "too slow", "unreadable"]
    outcomes = [Outcome(r, "1abc", (), (Skip(r, "1abc", "", r, "..."),)) for r in reasons]
    write_piece(work, [encode_outcome(outcome.file, outcome, {}) for outcome in outcomes])
    assert set(load_pieces(work, reasons)) == {"unreadable"}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"size": 1}'])
def test_a_damaged_record_is_parsed_again(work, damage):
    write_piece(work, [encode_outcome("key", Outcome("1.cif", "1abc", (sample("1abc", 4),)), {})])
    (record,) = (path for path in work.glob("*.json") if path.name != "options.json")
    record.write_bytes(damage)
    assert load_pieces(work, ["key"]) == {}


def test_the_key_changes_with_file_texts_and_options_and_with_nothing_else(tmp_path):
    path = tmp_path / "1abc.cif"
    path.write_text("data_1ABC")
    job = Job(path, "1abc.cif", "1abc", Text(facts=Facts(title="It")))
    key = job_key(job, Filters())
    assert job_key(replace(job, path=path.absolute()), Filters()) == key
    assert job_key(job, Filters(max_residues=9)) != key
    assert job_key(replace(job, text=Text(facts=Facts(title="That"))), Filters()) != key
    assert job_key(replace(job, file="sub/1abc.cif"), Filters()) != key
    os.utime(path, ns=(1, 1))
    changed = job_key(job, Filters())
    assert changed != key
    path.write_text("data_1ABC\n")
    os.utime(path, ns=(1, 1))
    assert job_key(job, Filters()) not in (key, changed)


def test_a_build_goes_on_only_with_the_same_options(tmp_path):
    assert not continues(tmp_path, {"methods": ["em"]})
    open_work(tmp_path, {"methods": ["em"]})
    assert continues(tmp_path, {"methods": ["em"]}) and not continues(tmp_path, {"methods": []})


def test_one_build_at_a_time_has_the_directory(tmp_path):
    """And one that is refused, or made nothing, leaves nothing behind."""
    out = tmp_path / "out"
    with holding(out):
        with pytest.raises(Busy, match=f"another build writes to {out} .process {os.getpid()} on "), holding(out):
            raise AssertionError("both have it")
    assert not out.exists()
    with pytest.raises(KeyError), holding(out):
        (out / "kept").touch()
        raise KeyError
    with holding(out):
        assert sorted(path.name for path in out.iterdir()) == [LOCK_NAME, "kept"]
    assert [path.name for path in out.iterdir()] == ["kept"]


def test_the_lock_of_a_build_that_was_killed_holds_nobody_up(tmp_path):
    if not (child := os.fork()):
        with holding(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and (tmp_path / LOCK_NAME).exists()
    with holding(tmp_path):
        pass
    assert not (tmp_path / LOCK_NAME).exists()


def test_notes_of_the_dead_are_taken_once(work):
    note_reading(work, "host-process-1", "5mr6.cif")
    note_reading(work, "host-process-2", "")
    assert take_notes(work) == {"host-process-1": "5mr6.cif"} and take_notes(work) == {}
