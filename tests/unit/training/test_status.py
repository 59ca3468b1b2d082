"""What is said of a run from its files alone: real ledgers, real locks, real processes, and files as a kill leaves
them."""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.training import status
from proteingpt.training.ledger import NAME, Ledger
from proteingpt.training.progress import NAME as PROGRESS
from proteingpt.training.signals import REQUEUE
from proteingpt.training.status import (
    FINISHED,
    NO_RUN,
    RUNNING,
    Signs,
    is_held,
    main,
    patience,
    process_state,
    read_status,
    state_of,
    trend,
)
from proteingpt.training.status_text import loss_text, rank_table, sparks, speed_text, text_of, what_is_wrong
from proteingpt.training.watchdog import FAILED, HUNG

REPOSITORY = Path(__file__).parents[3]
NO_PROCESS = 2**22  # more than any process's number

# ------------------------------------------------------------------------------------------------------ is it alive?


@pytest.mark.parametrize(
    "signs, state",
    [
        # A lock that is held is a process that lives, wherever it is.
        (Signs(True, None, 5.0), "running"),
        (Signs(True, None, 3000.0), "hung"),
        # A file system without locks: the process, if it can be seen.
        (Signs(None, "alive", 5.0), "running"),
        (Signs(None, "gone", 5.0), "dead"),
        (Signs(False, "gone", 1.0), "dead"),
        (Signs(False, "alive", 1.0), "running"),
        (Signs(True, "stopped", 1.0), "hung"),
        # Another machine's, whose locks may not reach here: what it wrote last.
        (Signs(False, None, 5.0), "running"),
        (Signs(False, None, 200.0), "dead"),
        (Signs(None, None, math.inf), "dead"),
        # A long evaluation, or a long step, is no hang.
        (Signs(True, "alive", 700.0, "training", 2.0), "hung"),
        (Signs(True, "alive", 700.0, "training", 60.0), "running"),
        (Signs(True, "alive", 700.0, "evaluating", 2.0), "running"),
        (Signs(True, "alive", 2000.0, "starting", None), "hung"),
    ],
)
def test_life_is_told_by_the_lock_then_the_process_then_the_age(signs, state):
    assert state_of(False, "", False, signs) == state


@pytest.mark.parametrize(
    "ended, waits, state",
    [("stopped", False, "stopped"), ("", True, "stopped"), ("", False, "dead"), ("ShardError: x", False, "dead")],
)
def test_one_that_does_not_live_has_stopped_or_died(ended, waits, state):
    assert state_of(False, ended, waits, Signs(False, "gone", 5.0)) == state
    # Where its machine cannot be seen, what it has said of its end counts at once, and its age where it has said
    # nothing.
    assert state_of(False, ended, waits, Signs(False, None, 5.0)) == (state if ended else "running")


def test_a_report_is_the_end_whatever_else_there_is():
    assert state_of(True, "", True, Signs(True, "stopped", 9999.0)) == "finished"


@given(st.floats(0, 1e6))
def test_patience_grows_with_the_steps(seconds):
    assert patience(Signs(True, None, 0.0, "training", seconds)) == max(600.0, 20 * seconds)


def test_a_lock_is_seen_and_not_disturbed(tmp_path):
    path = tmp_path / ".lock"
    assert is_held(path) is None
    with open(path, "a") as file:
        assert is_held(path) is False
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_held(path) is True and is_held(path) is True
        with open(path, "a") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert is_held(path) is False


def test_a_process_is_alive_stopped_or_gone_and_no_other_is_taken_for_it():
    child = subprocess.Popen(["sleep", "60"])
    now = time.time()
    try:
        assert process_state(child.pid, now, now) == "alive"
        assert process_state(child.pid, now - 5000, now) == "gone"  # its number was another's then
        child.send_signal(signal.SIGSTOP)
        while process_state(child.pid, now, now) == "alive":
            time.sleep(0.001)
        assert process_state(child.pid, now, now) == "stopped"
    finally:
        child.kill()
    deadline = time.monotonic() + 10
    while process_state(child.pid, now, now) != "gone":  # a zombie yet
        assert time.monotonic() < deadline
    child.wait()
    assert process_state(child.pid, now, now) == "gone"


# ------------------------------------------------------------------------------------------------------- a run's files


PROGRESS_VALUES = {
    "stages": ["align", "instruct"], "stage": "instruct", "step": 40, "first_step": 0, "num_steps": 100,
    "seconds_left": 90.0, "loss": 1.5, "losses": [2.0 - 0.01 * n for n in range(40)], "learning_rate": 1e-4,
    "gradient_norm": 0.5,
    "tokens_per_second": 12345.6, "samples_per_second": 80.0, "step_seconds": 1.5, "waiting_for_data_share": 0.004,
    "pack_fill": 0.991, "mfu": 0.451, "memory_gib": 61.0, "skipped_steps": 0, "quarantined_samples": 0,
    "slow_ranks": [], "ranks": [
        {"device": "NVIDIA H100 PCIe", "host": "n1", "tokens_per_second": 8000.4, "mfu": 0.46, "agreed_share": 0.65,
         "computing_speed": 9000.0, "not_computing_share": 0.02, "memory_gib": 61.2, "memory_total_gib": 79.1},
        {"device": "CPU", "host": "n2", "tokens_per_second": 4345.2, "mfu": None, "agreed_share": 0.35,
         "computing_speed": 5000.0, "not_computing_share": 0.03, "memory_gib": 30.5, "memory_total_gib": None},
    ],
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run of this process in its second start, in its second stage, that holds the lock of its directory."""
    before = Ledger(tmp_path, 2, True, wall_clock=lambda: 1e9)
    before.step("align", 9, 1.0, 0.0)
    before.end("stopped")
    before.close()
    ledger = Ledger(tmp_path, 2, True)
    ledger.line["began"] = time.time() - status.process_age(os.getpid())
    for step in range(1, 41):
        ledger.step("instruct", step, 0.001, 0.0)
    for stage, step in (("align", 9), ("instruct", 8), ("instruct", 30)):
        path = tmp_path / stage / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "checkpoint.json").write_text("{}" * 500)
    lines = [{"step": 20, "held_out_loss": 2.5}, {
        "step": 30, "held_out_loss": 1.25, "held_out_accuracy": 0.625, "held_out_blind_accuracy": 0.5,
        "held_out_lift": 0.125,
    }]  # fmt: skip
    (tmp_path / "instruct/evaluations.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "hel'
    )
    (tmp_path / PROGRESS).write_text(json.dumps(PROGRESS_VALUES))
    with open(tmp_path / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield tmp_path
    ledger.close()


def test_a_run_in_progress(run):
    found = read_status(run)
    assert (found["state"], found["code"], found["process"], found["lock_held"]) == ("running", RUNNING, "alive", True)
    assert (found["stage"], found["step"], found["num_steps"]) == ("instruct", 40, 100)
    assert (found["starts"], found["stops"], found["breaks"]) == (2, 1, 0)
    assert found["evaluation"] == {
        "stage": "instruct", "step": 30, "held_out_loss": 1.25, "held_out_accuracy": 0.625,
        "held_out_blind_accuracy": 0.5, "held_out_lift": 0.125,
    }  # fmt: skip
    assert (found["checkpoint"]["stage"], found["checkpoint"]["step"]) == ("instruct", 30)
    assert found["checkpoint"]["gib"] == pytest.approx(1000 / 2**30)
    assert 0 < found["seconds_left"] <= 90 and found["wrong"] == []
    json.dumps(found, allow_nan=False)


def test_what_people_read(run):
    text = text_of(read_status(run))
    for said in (
        f"{run}: running, stage instruct (2 of 2), step 40 of 100 (40%), 1 min ", "1.5000 nats per answer token, "
                                                                                  "falling",
        "loss 1.2500, accuracy 62.5%, blind 50.0%, lift +12.5 points, after step 30 of instruct",
        "12,346 tokens/s, 1.5 s a step, MFU 45.1%, packs 99.1% full, 0.4% waiting for data",
        "10 steps since", "2; stopped and saved 1 times, broken off 0 times", "wrong       nothing that shows from "
                                                                              "here",
    ):  # fmt: skip
        assert said in text, said
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()[0] in ("0", "1")}
    assert rows["0"] == ["NVIDIA", "H100", "PCIe", "(n1)", "8,000", "46.0%", "65.0%", "2.0%", "61.2", "of", "79.1"]
    assert rows["1"] == ["CPU", "(n2)", "4,345", "-", "35.0%", "3.0%", "30.5"]


def test_nothing_is_written_and_no_time_of_a_file_changes(run):
    def seen():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [run, *run.rglob("*")]}

    before = seen()
    main([str(run)])
    main([str(run), "--json"])
    assert seen() == before


def change(run: Path, **values):
    (run / PROGRESS).write_text(json.dumps({**PROGRESS_VALUES, **values}))


@pytest.mark.parametrize(
    "values, said",
    [
        ({"losses": [1.0] * 10 + [None]}, "a loss of the last steps is not finite"),
        ({"losses": [1.0, 1.1] * 8 + [3.0, 3.1] * 8}, "the loss rises"),
        ({"skipped_steps": 3}, "3 steps were skipped"),
        ({"quarantined_samples": 2}, "2 samples are quarantined"),
        ({"slow_ranks": [1]}, "rank 1 stays slower"),
        ({"waiting_for_data_share": 0.3}, "30% of the last step was waiting for data"),
        ({"ranks": [{**PROGRESS_VALUES["ranks"][0], "memory_gib": 78.9}]}, "rank 0 has used 78.9 of its 79.1 GiB"),
    ],
)
def test_what_is_wrong_is_said_in_words(run, values, said):
    change(run, **values)
    (only,) = read_status(run)["wrong"]
    assert said in only


def test_a_model_that_does_not_look_at_the_protein_is_told_from_one_that_does(run):
    with open(run / "instruct/evaluations.jsonl", "a") as file:
        blind = {"held_out_accuracy": 0.5, "held_out_blind_accuracy": 0.5, "held_out_lift": 0.0}
        file.write("\n" + json.dumps({"step": 40, "held_out_loss": 1.0, **blind}) + "\n")
    assert "no better than a model that sees no protein" in read_status(run)["wrong"][0]


def test_no_step_for_ten_minutes_while_the_process_lives(run):
    found = read_status(run, now=time.time() + 660)
    # Its process began 660 s earlier by this clock; the lock is held all the same.
    assert (found["state"], found["code"]) == ("hung", HUNG)
    assert "nothing was written for 11 min 00 s while training, where a step takes 1.5 s" in found["wrong"][0]


def test_a_run_whose_process_is_gone_names_its_last_checkpoint(run):
    (run / ".lock").unlink()
    ledger = Ledger(run, 2, True)
    ledger.line["pid"] = NO_PROCESS
    ledger.write()
    ledger.close()
    found = read_status(run)
    assert (found["state"], found["code"]) == ("dead", FAILED)
    assert (
        "is gone and said nothing of its end" in found["wrong"][0]
        and "goes on from step 30 of instruct" in found["wrong"][0]
    )


def test_a_run_of_another_machine_is_judged_by_what_it_wrote(run):
    (run / ".lock").unlink()
    near, far = read_status(run, host="elsewhere"), read_status(run, now=time.time() + 600, host="elsewhere")
    assert near["state"] == "running" and "cannot be looked at from here" in near["wrong"][0]
    assert far["state"] == "dead" and "nothing was written for 10 min" in far["wrong"][0]


def test_what_it_ended_with_is_said(run, tmp_path):
    (run / ".lock").unlink()
    ledger = Ledger(run, 2, True)
    ledger.end("ShardError: shard 7 of /data/é is torn" + "x" * 500)
    ledger.close()
    found = read_status(run)
    # The process of this test is that of the run, and lives: but for that it would be dead.
    assert found["ended"].startswith("ShardError: shard 7 of /data/? is torn") and len(found["ended"]) == 150
    assert "it ended with ShardError: shard 7" in what_is_wrong({**found, "state": "dead"})[0]


def test_a_finished_run_is_finished(run):
    (run / "report.json").write_text(json.dumps({"steps": 109, "seconds": 75.0}))
    found = read_status(run)
    assert (found["state"], found["code"]) == ("finished", FINISHED)
    assert text_of(found).startswith(f"{run}: finished, 109 steps in 1 min 15 s\n")


def test_a_stopped_run_waits_to_be_started_again(run):
    (run / ".lock").unlink()
    ledger = Ledger(run, 2, True)
    ledger.line["pid"] = NO_PROCESS
    ledger.end("stopped")
    ledger.close()
    found = read_status(run)
    assert (found["state"], found["code"], found["stops"]) == ("stopped", REQUEUE, 2)


# --------------------------------------------------------------------------------------- just begun, torn, or nothing


def test_a_run_that_has_only_just_begun(tmp_path):
    (tmp_path / "recipe.yaml").write_text("recipe: demo\n")
    assert read_status(tmp_path)["state"] == "running" and "none yet" in text_of(read_status(tmp_path))
    late = read_status(tmp_path, now=time.time() + 600)
    assert late["state"] == "dead" and "before it had begun" in late["wrong"][0]


@pytest.mark.parametrize("name", [NAME, PROGRESS, "report.json", "instruct/evaluations.jsonl", "recipe.yaml"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\x00" * 3000, b"\xff\xfe", b"[" * 5000, b'{"step": "x", "ranks": [1], "losses": ["y"]}'],
)
def test_torn_and_foreign_files_are_passed_over(run, name, content):
    (run / name).write_bytes(content)
    text_of(read_status(run))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
NONSENSE = PLAIN | st.lists(PLAIN, max_size=12)


@given(st.dictionaries(st.sampled_from(sorted(PROGRESS_VALUES)), NONSENSE))
def test_any_progress_file_is_shown_as_far_as_it_makes_sense(values):
    """Without a directory: what is made of the file's values."""
    found = status.progress_figures(values, 0.0)
    shown = loss_text(found) + speed_text(found) + "".join(rank_table(found["ranks"]))
    assert isinstance(shown, str)


def test_a_stage_never_leads_out_of_the_run(run):
    change(run, stages=["..", "/etc", "instruct"])
    assert read_status(run)["stages"] == ["instruct"]


def test_no_run_is_said_and_has_a_code_of_its_own(tmp_path, capsys):
    assert main([str(tmp_path)]) == NO_RUN and main([str(tmp_path / "missing")]) == NO_RUN
    assert "holds no run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ the figures


@pytest.mark.parametrize(
    "losses, word",
    [
        ([4.0, 4.1, 3.9, 4.0, 2.0, 2.1, 1.9, 2.0], "falling"),
        ([2.0, 2.1, 1.9, 2.0, 4.0, 4.1, 3.9, 4.0], "rising"),
        ([2.0, 4.0, 2.0, 4.0, 2.1, 4.1, 2.1, 4.1], "flat"),  # 0.1 where two standard errors are 1.6
        ([1.0] * 8, "flat"),
    ],
)
def test_a_trend_is_what_noise_does_not_explain(losses, word):
    assert trend(losses)["word"] == word and trend(losses)["steps"] == 4


def test_of_few_losses_or_of_one_that_is_not_finite_there_is_no_trend():
    assert trend([1.0] * 7) is None and trend([]) is None and trend([1.0] * 20 + [None]) is None


def test_an_odd_loss_is_left_out_at_the_far_end():
    assert trend([99.0, 1, 1, 1, 1, 2, 2, 2, 2]) == {"word": "rising", "now": 2.0, "before": 1.0, "steps": 4}


def test_sparks_by_hand():
    assert sparks([0.0, 7.0, 1.0]) == "▁█▂" and sparks([5.0, 5.0]) == "▁▁" and sparks([1.0]) == ""
    assert sparks([float(n // 2) for n in range(16)], width=8) == "▁▂▃▄▅▆▇█"


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_is_quick_prints_json_and_loads_no_torch(run):
    code = (
        "import sys; from proteingpt.training.status import main; main(sys.argv[1:]); print(*sys.modules, "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run), "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["step"] == 40
    assert not {"torch", "deepspeed", "transformers", "numpy"} & set(done.stderr.split())


def test_watch_redraws_until_the_run_has_finished(run):
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "launch/status.py"), str(run), "--json", "--watch", "0.05"], text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    states = [json.loads(process.stdout.readline())["state"] for _ in range(3)]
    (run / "report.json").write_text(json.dumps({"steps": 109, "seconds": 75.0}))
    rest = [json.loads(line)["state"] for line in process.stdout]
    assert states == ["running"] * 3 and rest[-1] == "finished" and set(rest[:-1]) <= {"running"}
    assert process.wait(10) == FINISHED
