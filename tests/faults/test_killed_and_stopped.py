"""Ranks that are killed, told to stop or stopped in the midst of training: each run is completed by the same command,
with the losses and weights of the run that met no fault."""

import json
import re
import signal
import threading
import time

import pytest
from fault_runs import EVERY, NUM_STEPS, FaultRun, assert_same_run

from proteingpt.training import restarts
from proteingpt.training.ledger import NAME, read_lines
from proteingpt.training.signals import REQUEUE
from proteingpt.training.watchdog import HUNG

# One of each kind is enough for every commit.
VICTIMS = [0, pytest.param(1, marks=pytest.mark.nightly)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_a_rank_that_is_told_to_stop_brings_the_others_along_and_saves(fault_folder, calm, number):
    run = FaultRun(fault_folder, f"told-{number.name}").begin()
    run.wait_for_step(EVERY + 3)
    began = time.monotonic()
    run.ranks[1].send_signal(number)
    assert run.codes(timeout=25) == [REQUEUE, REQUEUE]
    assert time.monotonic() - began < 25
    assert (run.directory / "requeue").read_text().startswith(number.name)
    stopped_at = run.steps_done()
    assert stopped_at < NUM_STEPS and (run.directory / f"instruct/step-{stopped_at:08d}").is_dir()
    run.finish()
    assert not (run.directory / "requeue").exists()
    assert_same_run(run, calm)
    assert run.report["goodput"]["replayed_steps"] == 0 and run.report["goodput"]["starts"] == 2


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_rank_is_started_again_from_the_last_checkpoint(fault_folder, calm, victim, capfd):
    run = FaultRun(fault_folder, f"killed-{victim}")
    killed = []

    def start(env):
        rank = run.fork(env)
        run.ranks.append(rank)
        if len(run.ranks) == 2:
            kill_later(run, victim, killed)
        return rank

    assert restarts.supervise(start, num_ranks=2, max_restarts=1) == 0, run.said[-3000:]
    said = capfd.readouterr().err
    assert f"rank {victim} was ended by SIGKILL" in said and said.count("starting again from the last checkpoint") == 1
    assert killed and len(run.ranks) == 4
    assert_same_run(run, calm)
    replayed = run.report["goodput"]["replayed_steps"]
    assert 0 < replayed <= 2 * EVERY  # a checkpoint that was being written is lost with rank 0


def kill_later(run: FaultRun, victim: int, killed: list):
    def work():
        run.wait_for_step(2 * EVERY + 5)
        run.ranks[victim].kill()
        killed.append(victim)

    threading.Thread(target=work, daemon=True).start()


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.nightly)])
def test_a_rank_that_hangs_is_named_and_every_stack_is_kept(fault_folder, calm, victim):
    run = FaultRun(fault_folder, f"hung-{victim}", {"--devices.hang_seconds": 4}).begin()
    run.wait_for_step(EVERY + 3)
    run.ranks[victim].send_signal(signal.SIGSTOP)
    run.ranks[1 - victim].wait(60)
    assert run.ranks[1 - victim].poll() == HUNG, run.said[-3000:]
    run.ranks[victim].kill()  # as its launcher does; on the machine of rank 0, the watchdog has done it already
    run.codes()
    errors = re.findall(r"^error: .*", run.said, re.MULTILINE)
    assert len(errors) == 1 and "the run hangs" in errors[0]
    named = f"rank {victim} (pid {run.ranks[victim].pid}" if victim else "rank 0 does not answer"
    assert named in errors[0]
    stack = (run.directory / f"stacks/rank-{1 - victim}.txt").read_text()
    assert "training/loop.py" in stack and "Thread" in stack
    if victim:  # woken for it
        assert "most recent call first" in (run.directory / f"stacks/rank-{victim}.txt").read_text()
    run.finish()
    assert_same_run(run, calm)


@pytest.fixture(scope="module")
def in_fp32(fault_folder):
    """in_fp32(name, **more): a run in fp32; the others of this file are in bf16, as ds_configs/zero2.json says."""
    ds_config = fault_folder / "fp32.json"
    ds_config.write_text(json.dumps({"gradient_clipping": 1.0, "zero_optimization": {"stage": 2, "overlap_comm": False}}))
    settings = {"--ds_config": ds_config, "--instruct.max_steps": 30}
    return lambda name, more: FaultRun(fault_folder, f"fp32-{name}", {**settings, **more})


@pytest.fixture(scope="module")
def calm_in_fp32(in_fp32):
    return in_fp32("calm", {}).finish()


@pytest.mark.nightly
@pytest.mark.parametrize("balance", ["equal", "measured"])
def test_a_kill_in_fp32_changes_no_bit_and_under_measured_speeds_the_rounding_alone(in_fp32, calm_in_fp32, balance):
    run = in_fp32(balance, {"--devices.balance": balance}).begin()
    run.wait_for_step(EVERY + 3)
    run.ranks[1].kill()
    assert 0 not in run.codes()
    run.finish()
    if balance == "equal":
        assert_same_run(run, calm_in_fp32)
    for tag in ("loss", "held_out_loss"):
        found, wanted = dict(run.curve(tag)), dict(calm_in_fp32.curve(tag))
        assert found == pytest.approx(wanted, rel=1e-5)


def test_the_ledger_adds_up(calm):
    (line,) = read_lines(calm.directory / NAME)
    assert line["ended"] == "finished" and line["useful_steps"] == NUM_STEPS + 2 and line["replayed_steps"] == 0
    assert sum(line["seconds"].values()) == pytest.approx(line["alive"], rel=0.02)
    assert calm.report["seconds"] == pytest.approx(line["alive"], rel=0.1)
    assert 0 < calm.report["goodput"]["goodput"] < 1 and "in useful steps" in calm.said
    assert json.loads((calm.directory / "report.json").read_text())["skipped_steps"] == 0


@pytest.mark.nightly
def test_a_second_run_in_the_same_place_is_refused(fault_folder, calm):
    first = FaultRun(fault_folder, "twice").begin()
    first.wait_for_step(2)
    first.ranks[0].send_signal(signal.SIGSTOP)  # holds its place for as long as the second waits
    second = FaultRun(fault_folder, "twice")
    second.log = fault_folder / "second.log"
    codes = second.begin().codes(timeout=90)
    assert 1 in codes and "another run is writing to" in second.said
    first.ranks[0].send_signal(signal.SIGCONT)
    assert first.codes(timeout=120) == [0, 0]
    assert_same_run(first, calm)
