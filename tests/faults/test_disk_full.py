"""A disk that is full in the midst of a run, for real: a small file system of its own, filled and emptied again."""

import errno
import re
import time

import pytest
from fault_runs import EVERY, NUM_STEPS, FaultRun, assert_same_run

from proteingpt.training.checkpoint import newest_valid


@pytest.fixture
def small_disk(disk_of):
    """A folder of 40 MB."""
    return disk_of("40m")


def fill(folder):
    """To the last byte."""
    ballast, block = folder / "ballast", b"\0" * 4096
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return ballast


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_curves_but_not_the_run(small_disk, fault_folder, calm):
    run = FaultRun(fault_folder, "full-for-a-while", {"--output": small_disk / "run"})
    run.directory = small_disk / "run"
    run.begin().wait_for(lambda: (run.directory / f"instruct/step-{EVERY:08d}").is_dir())
    ballast = fill(small_disk)
    run.wait_for(lambda: "cannot be written" in run.said and "the next save point tries again" in run.said)
    assert newest_valid(run.directory / "instruct"), "the last good one is gone"
    ballast.unlink()
    assert run.codes() == [0, 0], run.said[-3000:]
    assert re.search(r"checkpoint .*step-\d+ cannot be written: .*(No space|ENOSPC)", run.said)
    assert run.report["goodput"]["failed_saves"] >= 1 and run.report["steps_by_stage"]["instruct"] == NUM_STEPS
    weights = calm.weights()
    assert all((value == weights[name]).all() for name, value in run.weights().items())


@pytest.mark.nightly
def test_a_disk_that_stays_full_ends_the_run_with_one_error_and_the_last_good_checkpoint(
    small_disk, fault_folder, calm
):
    run = FaultRun(fault_folder, "full", {"--output": small_disk / "run"})
    run.directory = small_disk / "run"
    run.begin().wait_for(lambda: (run.directory / f"instruct/step-{EVERY:08d}").is_dir())
    ballast = fill(small_disk)
    began = time.monotonic()
    assert 1 in run.codes() and time.monotonic() - began < 60
    errors = [line for line in run.said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "could not be written" in errors[0] and "make room" in errors[0]
    assert newest_valid(run.directory / "instruct")
    ballast.unlink()
    run.finish()
    weights = calm.weights()
    assert all((value == weights[name]).all() for name, value in run.weights().items())
    assert [step for step, _ in run.curve()][-1] == NUM_STEPS


@pytest.mark.nightly
def test_the_shape_of_the_run_is_that_of_the_calm_one_elsewhere(small_disk, fault_folder, calm):
    """Without a fault the small disk is no other than a large one: what the tests above compare is comparable."""
    run = FaultRun(fault_folder, "small-calm", {"--output": small_disk / "run"})
    run.directory = small_disk / "run"
    assert_same_run(run.finish(), calm)
