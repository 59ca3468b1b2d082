"""What TensorBoard holds afterwards, read by TensorBoard's own reader, and the progress line."""

import io
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteingpt.training import monitor
from proteingpt.training.monitor import Monitor, StepReport, duration, memory_bytes


def report(loss: float = 2.5, seconds: float = 2.0) -> StepReport:
    return StepReport(
        loss=loss, learning_rate=1e-4, grad_norm=0.5, num_tokens=1000, num_samples=16, seconds=seconds,
        waiting_seconds=0.5,
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
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_step_is_written_at_the_number_of_steps_done(tmp_path):
    made = Monitor(tmp_path, "align", 0, 2, enabled=True)
    made.step(1, report())
    made.close()
    by_hand = {
        "loss": 2.5, "learning_rate": 1e-4, "gradient_norm": 0.5, "tokens_per_second": 500.0, "samples_per_second": 8.0,
        "step_seconds": 2.0, "waiting_for_data_share": 0.25, "encoders_share": 0.0,
    }  # fmt: skip
    for tag, value in by_hand.items():
        assert curve(tmp_path / "align", tag) == [(1, pytest.approx(value))]
    assert set(events(tmp_path / "align").Tags()["scalars"]) == {*by_hand, "memory_gib"}


def test_scores_and_texts_are_written_at_their_step(tmp_path):
    made = Monitor(tmp_path, "instruct", 0, 2, enabled=True)
    made.scalars(2, {"held_out_loss": 0.75})
    made.texts(2, ["first: yes", "second: no"])
    made.close()
    assert curve(tmp_path / "instruct", "held_out_loss") == [(2, 0.75)]
    texts = [events(tmp_path / "instruct").Tensors(f"answer_{n}/text_summary")[0] for n in range(2)]
    assert [text.tensor_proto.string_val[0].decode() for text in texts] == ["first: yes", "second: no"]
    assert [text.step for text in texts] == [2, 2]


def test_stages_are_runs_of_their_own(tmp_path):
    for stage, loss in (("align", 3.0), ("instruct", 1.0)):
        made = Monitor(tmp_path, stage, 0, 1, enabled=True)
        made.step(1, report(loss))
        made.close()
    assert curve(tmp_path / "align", "loss") == [(1, 3.0)] and curve(tmp_path / "instruct", "loss") == [(1, 1.0)]


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_a_resumed_stage_takes_back_what_was_drawn_beyond_its_checkpoint(tmp_path, resumed_at):
    """Five steps were drawn, then the run was killed; its last checkpoint is of step `resumed_at`."""
    for first, loss in ((0, 9.0), (resumed_at, 1.0)):
        made = Monitor(tmp_path, "align", first, 6, enabled=True)
        for step in range(first + 1, 6):
            made.step(step, report(loss))
        made.close()
    wanted = [(step, 9.0 if step <= resumed_at else 1.0) for step in range(1, 6)]
    assert curve(tmp_path / "align", "loss") == wanted


def test_ranks_other_than_the_first_write_and_say_nothing(tmp_path, capfd):
    made = Monitor(tmp_path, "align", 0, 1, enabled=False)
    made.step(1, report())
    made.scalars(1, {"held_out_loss": 1.0})
    made.texts(1, ["text"])
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the GPU's memory is shown")
def test_memory_is_the_peak_that_the_kernel_reports():
    with open("/proc/self/status") as status:
        kibibytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert memory_bytes() == pytest.approx(kibibytes * 1024, rel=0.05)


# ------------------------------------------------------------------------------------------------- what may go wrong


def test_a_disk_that_takes_no_curves_does_not_end_the_training_and_is_tried_again(tmp_path, clock, caplog):
    (tmp_path / "align").write_text("a file where the directory should be")
    made = Monitor(tmp_path, "align", 0, 9, enabled=True)
    for step in (1, 2):
        made.step(step, report())
        made.texts(step, ["text"])
    assert caplog.text.count("TensorBoard's files cannot be written") == 1
    (tmp_path / "align").unlink()
    clock.now += 61
    made.step(3, report())
    made.close()
    assert curve(tmp_path / "align", "loss") == [(3, 2.5)]


def test_a_log_on_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        full = open("/dev/full", "w", buffering=1)
        patched.setattr("sys.stderr", full)
        made = Monitor(tmp_path, "align", 0, 1, enabled=True)
        made.step(1, report())
        made.close()
    with pytest.raises(OSError, match="No space left"):  # it was tried for real
        full.close()
    assert curve(tmp_path / "align", "loss") == [(1, 2.5)]


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
    assert curve(tmp_path / "align", "loss") == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0)]
