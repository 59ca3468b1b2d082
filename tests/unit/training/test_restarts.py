"""The loop that starts ranks again, on small processes of its own."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from proteingpt.training import restarts
from proteingpt.training.restarts import check_alone, supervise, taken_out, verdict
from proteingpt.training.signals import REQUEUE


def starter(*scripts: str):
    """The n-th start of a rank runs the n-th script, which knows its RANK."""
    left = list(scripts)
    return lambda env: subprocess.Popen([sys.executable, "-c", "import os, signal, sys, time\n" + left.pop(0)], env=env)


FINE, DIES, WRONG = "pass", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(1)"
WAITS = "time.sleep(60)"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(restarts, "LEAVE_SECONDS", 0.5)


def test_a_run_that_ends_well_is_not_started_again():
    assert supervise(starter(FINE, FINE), 2, max_restarts=3) == 0


def test_a_dead_rank_ends_the_others_and_all_are_started_again(capfd):
    assert supervise(starter(DIES, WAITS, FINE, FINE), 2, max_restarts=1) == 0
    assert (
        "rank 0 was ended by SIGKILL: starting again from the last checkpoint (1 of 2 starts)" in capfd.readouterr().err
    )


def test_after_the_last_restart_the_fault_is_the_exit_code(capfd):
    assert supervise(starter(DIES, FINE, FINE, "sys.exit(70)"), 2, max_restarts=1) == 70
    assert "no restart is left (2 of 2 starts)" in capfd.readouterr().err


def test_a_users_error_and_a_saved_stop_are_not_tried_again():
    assert supervise(starter(WRONG, WAITS), 2, max_restarts=3) == 1
    assert supervise(starter(f"sys.exit({REQUEUE})", f"time.sleep(0.3); sys.exit({REQUEUE})"), 2, 3) == REQUEUE


def test_a_stopped_rank_is_ended_too():
    assert supervise(starter("os.kill(os.getpid(), signal.SIGSTOP)", DIES, FINE, FINE), 2, max_restarts=1) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_to_all_and_nothing_is_started_again(number):
    script = f"signal.signal({int(number)}, lambda *_: sys.exit({REQUEUE})); time.sleep(60)"
    threading.Timer(1.5, lambda: os.kill(os.getpid(), number)).start()
    began = time.monotonic()
    assert supervise(starter(script, script), 2, max_restarts=3) == REQUEUE
    assert time.monotonic() - began < 30


def test_every_start_has_a_port_of_its_own(tmp_path):
    note = (
        f"open({str(tmp_path / 'ports')!r}, 'a').write(os.environ['MASTER_PORT'] + ' ' + os.environ['WORLD_SIZE'] + "
        "'\\n')"
    )
    assert supervise(starter(f"{note}; {DIES}", f"{note}; {FINE}"), 1, max_restarts=1) == 0
    first, second = (tmp_path / "ports").read_text().splitlines()
    assert first != second and first.endswith(" 1")


@pytest.mark.parametrize(
    "codes, code",
    [
        ([0, 0], 0),
        ([0, 1], 1),
        ([70, 1], 1),
        ([85, 85], 85),
        ([85, 0], 85),
        ([85, 70], 70),
        ([-9, 70], 137),
        ([0, None], 137),
    ],
)
def test_one_code_for_all(codes, code):
    assert verdict(codes) == code


def test_a_rank_that_a_passed_on_signal_itself_ended_had_not_begun():
    """Its interpreter was still starting; without having been told it is a fault as any."""
    assert verdict([-15, 85], told=[signal.SIGTERM]) == verdict([-15, -15], told=[signal.SIGTERM]) == REQUEUE
    assert verdict([-15, 85]) == 143 and verdict([-9, 85], told=[signal.SIGTERM]) == 137


def test_options_are_taken_out_of_the_others():
    assert taken_out(["--a", "1", "--max-restarts", "3", "--ranks=2", "b"]) == (["--a", "1", "b"], 3, 2)
    assert taken_out(["--a"]) == (["--a"], None, None)


@pytest.mark.parametrize("argv", [["--max-restarts"], ["--max-restarts", "-1"], ["--ranks", "0"], ["--ranks=two"]])
def test_what_is_no_count_is_refused(argv):
    with pytest.raises(ValueError, match="expected a whole number"):
        taken_out(argv)


def test_under_a_launcher_the_options_are_refused():
    check_alone(3, None, {})
    check_alone(None, None, {"RANK": "0"})
    with pytest.raises(ValueError, match="RANK is set"):
        check_alone(3, None, {"RANK": "0"})
