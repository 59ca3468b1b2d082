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
from proteingpt.training.ledger import NAME, PARTS, read_lines
from proteingpt.training.run import hold
from proteingpt.training.signals import REQUEUE
from proteingpt.training.watchdog import FAILED, HUNG

# One of each kind is enough for every commit.
VICTIMS = [0, pytest.param(1, marks=pytest.mark.nightly)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_a_rank_that_is_told_to_stop_brings_the_others_along_and_saves(fault_folder, calm, number):
    run = FaultRun(fault_folder, f"told-{number.name}").begin()
    run.wait_for_step(EVERY + 3)
    began = time.monotonic()
    while run.ranks[1].poll() is None and time.monotonic() - began < 25:
        run.ranks[1].send_signal(number)  # more than once, as where a batch system and a launcher both pass it on
        time.sleep(0.05)
    assert run.codes(timeout=25) == [REQUEUE, REQUEUE]
    assert time.monotonic() - began < 25
    assert (run.directory / "requeue").read_text().startswith(number.name)
    stopped_at = run.steps_done()
    assert stopped_at < NUM_STEPS and (run.directory / f"instruct/step-{stopped_at:08d}").is_dir()
    run.finish()
    assert not (run.directory / "requeue").exists()
    assert_same_run(run, calm)
    assert run.report["goodput"]["replayed_steps"] == 0 and run.report["goodput"]["starts"] == 2


@pytest.mark.nightly
def test_a_rank_that_is_told_while_all_are_loading_brings_the_others_along(fault_folder):
    """Rank 0 is at something that takes long, for which the other waits in a collective: here for the run's
    directory."""
    run = FaultRun(fault_folder, "told-early")
    with hold(run.directory):
        run.begin()
        time.sleep(4)  # within the 40 s that it waits for another run to leave
        began = time.monotonic()
        run.ranks[1].send_signal(signal.SIGUSR1)
        assert run.codes(timeout=25) == [REQUEUE, REQUEUE], run.said[-3000:]
        assert time.monotonic() - began < 25 and "nothing to save" in run.said


def test_a_fault_of_rank_0_before_training_is_no_users_error_on_the_other(fault_folder):
    """Or --max-restarts would not try again."""
    run = FaultRun(fault_folder, "odd")
    (run.directory / "recipe.yaml").mkdir(parents=True)
    assert run.begin().codes() == [FAILED, FAILED]
    assert "Is a directory" in run.said


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
    """in_fp32(name, more): a run in fp32; the others of this file are in bf16, as ds_configs/zero2.json says."""
    settings = {"--ds_config": ds_config_in_fp32(fault_folder, 2), "--instruct.max_steps": 30}
    return lambda name, more: FaultRun(fault_folder, f"fp32-{name}", {**settings, **more})


def ds_config_in_fp32(folder, stage: int):
    path = folder / f"fp32-zero{stage}.json"
    path.write_text(
        json.dumps({"gradient_clipping": 1.0, "zero_optimization": {"stage": stage, "overlap_comm": False}})
    )
    return path


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
    for tag in ("learning/loss", "learning/held_out_loss"):
        found, wanted = dict(run.curve(tag)), dict(calm_in_fp32.curve(tag))
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("num_ranks, stage", [(1, 3), (3, 1)])
def test_a_stopped_run_goes_on_with_other_ranks_and_another_stage_by_the_same_command(
    in_fp32, calm_in_fp32, fault_folder, num_ranks, stage
):
    """From its files, with no tool in between: two ranks of ZeRO 2 begin, one of ZeRO 3 or three of ZeRO 1 end."""
    run = in_fp32(f"then-{num_ranks}", {}).begin()
    run.wait_for_step(EVERY + 3)
    run.ranks[0].send_signal(signal.SIGUSR1)
    assert run.codes() == [REQUEUE, REQUEUE]
    after = in_fp32(f"then-{num_ranks}", {"--ds_config": ds_config_in_fp32(fault_folder, stage)})
    assert after.begin(num_ranks).codes() == [0] * num_ranks, after.said[-3000:]
    for tag in ("learning/loss", "learning/held_out_loss"):
        assert dict(after.curve(tag)) == pytest.approx(dict(calm_in_fp32.curve(tag)), rel=1e-5)
    assert len(after.curve()) == 30 and after.report["goodput"]["replayed_steps"] == 0


def test_the_ledger_adds_up(calm):
    (line,) = read_lines(calm.directory / NAME)
    assert line["ended"] == "finished" and line["useful_steps"] == NUM_STEPS + 2 and line["replayed_steps"] == 0
    assert sum(line["seconds"].values()) == pytest.approx(line["alive"], rel=0.02)
    assert calm.report["seconds"] == pytest.approx(line["alive"], rel=0.1)
    assert 0 < calm.report["goodput"]["goodput"] < 1 and "in useful steps" in calm.said
    drawn = {part: calm.curve(f"time/{part}")[-1] for part in ("goodput", *PARTS)}
    assert {step for step, _ in drawn.values()} == {NUM_STEPS}
    assert sum(drawn[part][1] for part in PARTS) == pytest.approx(1.0, abs=0.02) and 0 < drawn["goodput"][1] < 1
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
