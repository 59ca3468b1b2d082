"""Where the time went, by hand."""

import json

import pytest

from proteingpt.training.ledger import LINE_BYTES, NAME, Ledger, padded, process_age, read_lines, summary, summary_text


class Clock:
    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def begin(tmp_path):
    """begin(wall): a ledger on clocks of the test; age 5 s."""

    def make(wall: float = 1e9) -> tuple[Ledger, Clock]:
        clock = Clock(100.0)
        return Ledger(tmp_path, 2, True, age=5.0, clock=clock, wall_clock=lambda: wall), clock

    return make


def test_a_start_that_ends_well(begin, tmp_path):
    ledger, clock = begin()
    clock.now += 10  # loads
    for step in (1, 2):
        clock.now += 4
        ledger.step("align", step, seconds=4.0, waiting_seconds=1.0)
    with ledger.spending("saving"):
        clock.now += 2
    ledger.end("finished")
    (line,) = read_lines(tmp_path / NAME)
    assert line["alive"] == 25.0 and line["steps"] == {"align": 2}
    assert line["seconds"] == {
        "useful_steps": 6.0, "replayed_steps": 0.0, "waiting_for_data": 2.0, "saving": 2.0, "evaluating": 0.0,
        "starting": 15.0,
    }  # fmt: skip
    assert ledger.summary()["goodput"] == pytest.approx(6 / 25, abs=1e-4)


def test_who_looks_meanwhile_sees_what_it_is_doing(begin, tmp_path):
    def seen() -> str:
        return read_lines(tmp_path / NAME)[-1]["doing"]

    ledger, _ = begin()
    assert seen() == "starting"
    ledger.step("align", 1, 1.0, 0.0)
    assert seen() == "training"
    with ledger.spending("evaluating"):
        assert seen() == "evaluating"
        with ledger.spending("saving"):
            assert seen() == "saving"
        assert seen() == "evaluating"
    assert seen() == "training"
    ledger.between_stages()
    assert seen() == "starting"


def test_what_it_ended_with_fits_a_line_whatever_it_is(begin, tmp_path):
    ledger, _ = begin()
    for step in range(1, 3):
        ledger.step("instruct", 10**9 + step, 1e9, 1e8)
    for letter in ('"', "\\", "\x00", "\n", "\u00e9", "x"):
        ledger.end(letter * 1000)
        (line,) = read_lines(tmp_path / NAME)
        assert len(line["ended"]) == 150 and line["host"]


def test_what_an_earlier_start_had_done_is_a_replay(begin, tmp_path):
    first, clock = begin()
    for step in range(1, 8):
        clock.now += 1
        first.step("align", step, 1.0, 0.0)
    first.close()  # killed: it never said how it ended
    second, clock = begin(wall=5.0)  # a clock that was set back
    for step in range(5, 11):
        clock.now += 1
        second.step("align", step, 1.0, 0.0)
    totals = second.summary()
    assert (totals["useful_steps"], totals["replayed_steps"], totals["starts"]) == (7 + 3, 3, 2)
    assert totals["seconds"] == (5 + 7) + (5 + 6) and totals["goodput"] == pytest.approx(10 / 23, abs=1e-4)
    assert "43.5% in useful steps" in summary_text(totals) and "2 start(s)" in summary_text(totals)


def test_steps_that_the_run_went_back_behind_are_replays(begin):
    ledger, _ = begin()
    for step in (1, 2, 3, 2, 3, 4):
        ledger.step("align", step, 1.0, 0.0)
    assert (ledger.counts["useful_steps"], ledger.counts["replayed_steps"]) == (4, 2)


def test_the_file_does_not_grow_with_the_steps(begin, tmp_path):
    ledger, _ = begin()
    for step in range(1, 1000):
        ledger.step("instruct", step, 0.1, 0.0)
    assert (tmp_path / NAME).stat().st_size == LINE_BYTES


@pytest.mark.parametrize(
    "torn", [b"", b"{", b"\x00" * 700, b"[1]\n", b'{"alive": 1}\n', b"\xff\xfe\n", b"[" * 5000 + b"\n"]
)
def test_a_torn_line_is_passed_over_and_the_next_start_has_its_own(begin, tmp_path, torn):
    ledger, _ = begin()
    ledger.step("align", 1, 1.0, 0.0)
    with open(tmp_path / NAME, "ab") as file:
        file.write(torn)
    again, _ = begin()
    assert again.furthest == {"align": 1}
    assert [line["steps"] for line in read_lines(tmp_path / NAME)][0] == {"align": 1}
    assert len(read_lines(tmp_path / NAME)) == 2


def test_a_disk_that_takes_nothing_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    ledger = Ledger(tmp_path / "file", 2, True)  # no directory
    for step in range(3):
        ledger.step("align", step, 1.0, 0.0)
    assert caplog.text.count("cannot be written") == 1


def test_other_ranks_write_nothing(tmp_path):
    Ledger(tmp_path, 2, enabled=False).step("align", 1, 1.0, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_no_goodput():
    assert summary([])["goodput"] == 0.0


def test_a_line_is_json_of_a_fixed_length():
    assert len(padded({"a": 1})) == LINE_BYTES and json.loads(padded({"a": 1})) == {"a": 1}


def test_a_process_is_as_old_as_ps_says():
    import os
    import subprocess

    said = float(subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True, text=True).stdout)
    assert process_age() == pytest.approx(said, abs=2.0)
