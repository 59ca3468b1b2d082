"""Signals that ask for a stop, on a process of this machine; and the ranks' agreement, on two."""

import os
import signal
import subprocess
import sys
import time

import pytest

from proteingpt.training.signals import REQUEUE, Agreement, Listener, StopRequest, is_gone, launchers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_read_and_does_not_end_the_process(number):
    before = signal.getsignal(number)
    listener = Listener()
    try:
        assert listener.received() is None
        os.kill(os.getpid(), number)
        assert listener.received() == number.name
        assert listener.received() is None
    finally:
        listener.close()
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_at_once():
    code = (
        "import os, signal, time\n"
        "from proteingpt.training.signals import Listener\n"
        "listener = Listener()\n"
        "os.kill(os.getpid(), signal.SIGINT); print('lives', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(5); print('still', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "lives\n" and "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_process_that_is_signalled_before_anything_has_begun_asks_to_be_started_again(number):
    """Also while it waits in C, as in a rendezvous: here for a line that does not come."""
    code = (
        "import sys\n"
        "from proteingpt.training.signals import Early\n"
        "Early(); print('listens', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "listens\n"
        process.send_signal(number)
        assert process.wait(10) == REQUEUE
        assert f"stopped by {number.name} before anything had begun" in process.stderr.read()


def test_what_listened_early_is_handed_over_with_what_came_meanwhile():
    """No moment between the two, in which a signal would end the process; and the first reads no more."""
    code = (
        "import os, signal, time\n"
        "from proteingpt.training.signals import Early\n"
        "listener = Early().hand_over()\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.3); print(listener.received(), flush=True)\n"
        "listener.ignore(); listener.close(); os.kill(os.getpid(), signal.SIGTERM); print('too late', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "SIGTERM\ntoo late\n"), done.stderr


def test_the_first_reason_stays():
    request = StopRequest()
    assert not request
    request.ask("SIGTERM")
    request.ask("SIGUSR1")
    assert request and request.reason == "SIGTERM"


def test_an_orphan_knows_that_its_launcher_is_gone():
    code = (
        "import time\n"
        "from proteingpt.training.signals import is_gone, launchers\n"
        "known = launchers(); print(is_gone(known), flush=True)\n"
        "while not is_gone(known): time.sleep(0.02)\n"
        "print('gone', flush=True)\n"
    )
    launcher = subprocess.Popen(["sh", "-c", f'{sys.executable} -c "{code}" & wait'], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout.readline() == "False\n"
    launcher.kill()
    launcher.wait()
    assert launcher.stdout.readline() == "gone\n"
    assert not is_gone(launchers())


def agree_on_rank(rank, device, who: int, when: int) -> list[bool]:
    agreed = Agreement(rank.world_size)
    said = []
    for step in range(6):
        time.sleep(0.01 * rank.rank)  # never in step by chance
        said.append(agreed(rank.rank == who and step >= when))
    return [*said, agreed.now(rank.rank == who)]


@pytest.mark.parametrize("who", [0, 1])
def test_all_ranks_stop_after_the_same_step_whichever_was_told(worlds, who):
    first, second = worlds(2)(agree_on_rank, who, 2)
    assert first == second == [False, False, False, True, True, True, True]


def test_nobody_told_nobody_stops(worlds):
    assert worlds(2)(agree_on_rank, 7, 0) == [[False] * 7] * 2


def test_one_rank_agrees_with_itself_at_once():
    agreed = Agreement(1)
    assert [agreed(False), agreed(True), agreed.now(True)] == [False, True, True]
