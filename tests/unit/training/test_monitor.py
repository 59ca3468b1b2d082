"""What TensorBoard holds afterwards, read by TensorBoard's own reader, the progress line, and RUN/progress.json."""

import io
import json
import math
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteingpt.training import monitor, trackers
from proteingpt.training.balance import Exchanged
from proteingpt.training.curves import CURVES
from proteingpt.training.monitor import RANKS_SHOWN, Monitor, StepReport
from proteingpt.training.progress import ProgressFile
from proteingpt.training.tally import RankReport


def report(loss: float = 2.5, seconds: float = 2.0, pack_fill: float | None = None) -> StepReport:
    return StepReport(
        loss=loss, learning_rate=1e-4, grad_norm=0.5, num_tokens=1000, num_samples=16, seconds=seconds,
        waiting_seconds=0.5, pack_fill=pack_fill,
    )  # fmt: skip


def events(directory) -> EventAccumulator:
    reader = EventAccumulator(str(directory))
    reader.Reload()
    return reader


def curve(directory, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(directory).Scalars(tag)]


@pytest.fixture
def clock(monkeypatch):
    """The monitor's own clock, set by the test."""
    clock = SimpleNamespace(now=1000.0)
    for module in (monitor, trackers):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_step_is_written_at_the_number_of_steps_done(tmp_path):
    made = Monitor(tmp_path, "align", 0, 2, enabled=True)
    made.step(1, report())
    made.close()
    by_hand = {
        "learning/loss": 2.5, "learning/learning_rate": 1e-4, "vitals/gradient_norm": 0.5,
        "speed/tokens_per_second": 500.0, "speed/samples_per_second": 8.0, "speed/step_seconds": 2.0,
        "speed/waiting_for_data_share": 0.25,
        "speed/encoders_share": 0.0, "speed/waiting_for_encoders_share": 0.0,
    }  # fmt: skip
    for tag, value in by_hand.items():
        assert curve(tmp_path / "align", tag) == [(1, pytest.approx(value))]
    assert set(events(tmp_path / "align").Tags()["scalars"]) == {*by_hand, "vitals/memory_gib"} <= CURVES.keys()


def test_scores_and_texts_are_written_at_their_step(tmp_path):
    made = Monitor(tmp_path, "instruct", 0, 2, enabled=True)
    made.scalars(2, {"learning/held_out_loss": 0.75})
    made.texts(2, {"answer_0": "first: yes", "answer_1": "second: no"})
    made.close()
    assert curve(tmp_path / "instruct", "learning/held_out_loss") == [(2, 0.75)]
    texts = [events(tmp_path / "instruct").Tensors(f"answer_{n}/text_summary")[0] for n in range(2)]
    assert [text.tensor_proto.string_val[0].decode() for text in texts] == ["first: yes", "second: no"]
    assert [text.step for text in texts] == [2, 2]


def test_stages_are_runs_of_their_own(tmp_path):
    for stage, loss in (("align", 3.0), ("instruct", 1.0)):
        made = Monitor(tmp_path, stage, 0, 1, enabled=True)
        made.step(1, report(loss))
        made.close()
    assert curve(tmp_path / "align", "learning/loss") == [(1, 3.0)] and curve(
        tmp_path / "instruct", "learning/loss"
    ) == [(1, 1.0)]


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_a_resumed_stage_takes_back_what_was_drawn_beyond_its_checkpoint(tmp_path, resumed_at):
    """Five steps were drawn, then the run was killed; its last checkpoint is of step `resumed_at`."""
    for first, loss in ((0, 9.0), (resumed_at, 1.0)):
        made = Monitor(tmp_path, "align", first, 6, enabled=True)
        for step in range(first + 1, 6):
            made.step(step, report(loss))
        made.close()
    wanted = [(step, 9.0 if step <= resumed_at else 1.0) for step in range(1, 6)]
    assert curve(tmp_path / "align", "learning/loss") == wanted


def test_ranks_other_than_the_first_write_and_say_nothing(tmp_path, capfd):
    made = Monitor(tmp_path, "align", 0, 1, enabled=False, settings={"a": 1}, progress=ProgressFile(tmp_path, {}))
    made.step(1, report())
    made.scalars(1, {"learning/held_out_loss": 1.0})
    made.texts(1, {"answer_0": "text"})
    made.ranks(1, exchanged(1))
    made.note(True, step=3)
    made.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_the_line_shows_step_loss_rate_and_time_left(tmp_path, capfd, clock):
    made = Monitor(tmp_path, "align", 0, 10, enabled=True)
    clock.now += 10
    made.step(2, report())  # 5 s a step, 8 to go
    assert capfd.readouterr().err == "align 2/10  loss 2.5000  lr 1.00e-04  500 tokens/s  40 s left\n"
    made.close()


def test_time_left_counts_only_steps_of_this_start(tmp_path, capfd, clock):
    made = Monitor(tmp_path, "align", 4, 10, enabled=True)
    clock.now += 10
    made.step(6, report())  # 2 steps in 10 s, 4 to go
    assert capfd.readouterr().err.endswith(" 20 s left\n")
    made.close()


def test_a_file_gets_a_line_now_and_then_and_always_the_last(tmp_path, capfd, clock):
    made = Monitor(tmp_path, "align", 0, 8, enabled=True)
    for step in range(1, 9):
        clock.now += 2
        made.step(step, report())
    shown = [line.split()[1] for line in capfd.readouterr().err.splitlines()]
    assert shown == ["1/8", "4/8", "7/8", "8/8"]  # each 5 s or more apart, and the end
    made.close()


def test_a_terminal_gets_one_line_that_is_redrawn(tmp_path, monkeypatch, clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    made = Monitor(tmp_path, "align", 0, 3, enabled=True)
    for step in (1, 2, 3):
        made.step(step, report())
    made.close()
    drawn = terminal.getvalue()
    assert drawn.count("\r") == 2 and drawn.count("\n") == 1 and drawn.endswith("0 s left\n")
    assert all(f"align {step}/3" in drawn for step in (1, 2, 3))


# ----------------------------------------------------------------------------------------------------------- ranks


def rank_report(tokens: float, flops: float | None = None, peak: float | None = None) -> RankReport:
    return RankReport("CPU" if peak is None else "GPU", "here", tokens, flops, peak, 1.5, None)


def exchanged(num_ranks: int, told=None) -> Exchanged:
    """Rank r computes 100 (r + 1) tokens a second, waits r per cent of the time and gets 1 / num_ranks of a step."""
    ranks = range(num_ranks)
    told = told or [rank_report(50.0 * (rank + 1)) for rank in ranks]
    return Exchanged(
        [100.0 * (rank + 1) for rank in ranks], [rank / 100 for rank in ranks], [], [1 / num_ranks] * num_ranks, told
    )


def last_values(directory) -> dict[str, float]:
    reader = events(directory)
    return {tag: reader.Scalars(tag)[-1].value for tag in reader.Tags()["scalars"]}


def test_each_rank_has_its_own_curves(tmp_path):
    made = Monitor(tmp_path, "align", 0, 9, enabled=True)
    made.ranks(5, exchanged(2))
    made.close()
    by_hand = {
        "speed_by_rank/computing_speed": [100, 200], "speed_by_rank/tokens_per_second": [50, 100],
        "speed_by_rank/agreed_share": [0.5, 0.5], "vitals_by_rank/not_computing_share": [0, 0.01],
        "vitals_by_rank/memory_gib": [1.5, 1.5],
    }  # fmt: skip
    wanted = {f"{tag}/rank_{rank}": value for tag, values in by_hand.items() for rank, value in enumerate(values)}
    assert last_values(tmp_path / "align") == pytest.approx({**wanted, "vitals/ranks_that_stay_slow": 0.0})
    assert by_hand.keys() <= CURVES.keys()


def test_mfu_is_that_of_each_device_and_of_all_together(tmp_path):
    """300 of 1000 and 60 of 100 FLOP/s; together 360 of 1100, not the mean of 30 and 60 %."""
    made = Monitor(tmp_path, "align", 0, 9, enabled=True)
    made.ranks(5, exchanged(2, [rank_report(1, 300.0, 1000.0), rank_report(1, 60.0, 100.0)]))
    made.close()
    found = last_values(tmp_path / "align")
    assert found["speed_by_rank/mfu/rank_0"] == pytest.approx(0.3) and found[
        "speed_by_rank/mfu/rank_1"
    ] == pytest.approx(0.6)
    assert found["speed/mfu"] == pytest.approx(360 / 1100)


def test_no_mfu_of_all_is_made_up_where_one_device_is_not_known(tmp_path):
    made = Monitor(tmp_path, "align", 0, 9, enabled=True)
    made.ranks(5, exchanged(2, [rank_report(1, 300.0, 1000.0), rank_report(1)]))
    made.close()
    assert not [tag for tag in last_values(tmp_path / "align") if "mfu" in tag]


def test_of_many_ranks_the_extremes_are_shown(tmp_path):
    num_ranks = RANKS_SHOWN + 1
    made = Monitor(tmp_path, "align", 0, 9, enabled=True)
    made.ranks(5, exchanged(num_ranks))
    made.close()
    found = {
        tag: value
        for tag, value in last_values(tmp_path / "align").items()
        if tag.startswith("speed_by_rank/computing")
    }
    names = {"min": 100, "median": 100 * (num_ranks + 1) / 2, "max": 100 * num_ranks}
    assert found == {f"speed_by_rank/computing_speed/{name}": value for name, value in names.items()}


# -------------------------------------------------------------------------------------------------- progress.json


def test_progress_says_where_the_stage_is(tmp_path, clock):
    made = Monitor(tmp_path, "align", 4, 10, enabled=True, progress=ProgressFile(tmp_path, {"stages": ["align"]}))
    read = lambda: json.loads((tmp_path / "progress.json").read_text())  # noqa: E731
    assert read() == {"stages": ["align"], "stage": "align", "step": 4, "first_step": 4, "num_steps": 10}
    clock.now += 10
    made.step(5, report(4.0, pack_fill=0.75))
    made.step(6, report(math.nan, pack_fill=0.5))
    made.ranks(6, exchanged(1))
    made.close()
    found = read()
    assert found["step"] == 6 and found["losses"] == [4.0, None] and found["loss"] is None
    assert found["seconds_left"] == 20.0 and found["tokens_per_second"] == 500.0 and found["pack_fill"] == 0.5
    (row,) = found["ranks"]
    assert (row["device"], row["host"], row["tokens_per_second"], row["agreed_share"]) == ("CPU", "here", 50.0, 1.0)
    assert row["mfu"] is None


# ------------------------------------------------------------------------------------------------- what may go wrong


def test_a_disk_that_takes_no_curves_does_not_end_the_training_and_is_tried_again(tmp_path, clock, caplog):
    (tmp_path / "align").write_text("a file where the directory should be")
    made = Monitor(tmp_path, "align", 0, 9, enabled=True)
    for step in (1, 2):
        made.step(step, report())
        made.texts(step, {"answer_0": "text"})
    assert caplog.text.count("TensorBoard's files cannot be written") == 1
    (tmp_path / "align").unlink()
    clock.now += 61
    made.step(3, report())
    made.close()
    assert curve(tmp_path / "align", "learning/loss") == [(3, 2.5)]


def test_a_log_on_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        full = open("/dev/full", "w", buffering=1)
        patched.setattr("sys.stderr", full)
        made = Monitor(tmp_path, "align", 0, 1, enabled=True)
        made.step(1, report())
        made.close()
    with pytest.raises(OSError, match="No space left"):  # it was tried for real
        full.close()
    assert curve(tmp_path / "align", "learning/loss") == [(1, 2.5)]


def test_a_clock_that_was_set_back_does_not_disturb_the_order_of_the_curves(tmp_path):
    """Five steps under a clock that is ahead, by the file's name; then resumed at three."""
    for first, loss in ((0, 9.0), (3, 1.0)):
        made = Monitor(tmp_path, "align", first, 6, enabled=True)
        for step in range(first + 1, 6):
            made.step(step, report(loss))
        made.close()
        if first == 0:
            (path,) = (tmp_path / "align").iterdir()
            path.rename(path.with_name(path.name.replace(path.name.split(".")[3], "4000000000", 1)))
    assert curve(tmp_path / "align", "learning/loss") == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0)]
