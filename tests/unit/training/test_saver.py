"""Saving in the background: nothing is lost when it fails, and its errors come to light."""

import json
import resource
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from proteingpt.training.checkpoint import CheckpointError, Progress, newest_valid, read_best, read_state
from proteingpt.training.saver import Saver


def state(value: float) -> dict:
    return {kind: {"a": torch.full((4000,), value)} for kind in ("weights", "exp_avg", "exp_avg_sq")}


def progress(step: int) -> Progress:
    return Progress("align", step, 10, "plan")


@contextmanager
def no_room():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_saves_follow_each_other_and_the_last_is_there_at_the_end(tmp_path):
    saver = Saver(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        saver.start(state(step), progress(step))
    saver.finish(3)
    assert newest_valid(tmp_path).name == "step-00000003"
    assert read_state(tmp_path / "step-00000002")["exp_avg"]["a"].eq(2.0).all()
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_a_save_that_the_disk_did_not_take_is_said_counted_and_made_good_by_the_next(tmp_path, caplog):
    failed = []
    saver = Saver(tmp_path, 2, lambda: failed.append(1))
    saver.start(state(1), progress(1))
    saver.wait()
    with no_room():
        saver.start(state(2), progress(2))
        saver.wait()
        with pytest.raises(CheckpointError, match="step 2 could not be written .* make room"):
            saver.finish(2)
    assert failed == [1] and "step-00000001 stays" in caplog.text
    assert newest_valid(tmp_path).name == "step-00000001"
    saver.start(state(3), progress(3))
    saver.finish(3)
    assert newest_valid(tmp_path).name == "step-00000003"


def test_an_error_of_ours_comes_to_light_at_the_next_save(tmp_path):
    saver = Saver(tmp_path, 2)
    saver.start({"weights": {"a": "no tensor"}}, progress(1))
    with pytest.raises(Exception, match="str"):
        saver.start(state(2), progress(2))


def test_the_best_is_marked_once_it_is_on_the_disk(tmp_path):
    saver = Saver(tmp_path, 1)
    saver.start(state(1), progress(1))
    saver.mark_best(1, "loss", 0.5)
    saver.mark_best(2, "loss", 0.4)  # never saved
    assert read_best(tmp_path) == json.loads((tmp_path / "best.json").read_text())
    assert read_best(tmp_path)["checkpoint"] == "step-00000001"


def test_a_slow_disk_is_told_from_one_that_stands_still(tmp_path):
    """A save whose file grows for two seconds and then does not for three: signs of life come with the bytes alone."""
    signs, still = [], []
    saver = Saver(tmp_path, 2, grows=lambda: signs.append(time.monotonic()))

    def write_slowly():
        aside = tmp_path / ".step-00000001.partial"
        aside.mkdir()
        with open(aside / "weights.safetensors", "wb", buffering=0) as file:
            for _ in range(20):
                file.write(b"0" * 100)
                time.sleep(0.1)
        still.append(time.monotonic())
        time.sleep(3.5)

    saver.thread = threading.Thread(target=write_slowly)
    saver.thread.start()
    saver.wait()
    assert signs and all(moment < still[0] + 1.5 for moment in signs)
