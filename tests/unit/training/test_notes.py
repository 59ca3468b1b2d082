"""Files of lines beside the checkpoints: written once, read though torn, and no reason to end a run."""

import json

import pytest

from proteingpt.training.notes import append_new_lines, evaluated_steps, note_evaluation


def test_a_run_that_went_back_notes_nothing_twice(tmp_path):
    path = tmp_path / "set_aside.jsonl"
    append_new_lines(path, ["a", "b"])
    append_new_lines(path, ["b", "c"])
    assert path.read_text() == "a\nb\nc\n"


def test_an_evaluation_is_known_by_its_line_and_a_torn_line_is_none(tmp_path):
    path = tmp_path / "align" / "evaluations.jsonl"
    assert evaluated_steps(path) == set()
    for step in (2, 4, 6):
        note_evaluation(path, {"step": step, "held_out_loss": 1.0})
    path.write_bytes(path.read_bytes()[:-9] + b"\n[3]\n\xff\n")
    assert evaluated_steps(path) == {2, 4}


@pytest.mark.parametrize(
    "write", [lambda path: append_new_lines(path, ["a"]), lambda path: note_evaluation(path, {"step": 1})]
)
def test_what_cannot_be_written_is_said(tmp_path, caplog, write):
    (tmp_path / "notes").mkdir()
    write(tmp_path / "notes")
    assert "notes cannot be written: Is a directory" in caplog.text


def test_notes_are_lines_of_json(tmp_path):
    note_evaluation(tmp_path / "e", {"step": 1, "held_out_loss": 0.5})
    assert json.loads((tmp_path / "e").read_text()) == {"step": 1, "held_out_loss": 0.5}
