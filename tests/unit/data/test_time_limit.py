"""The alarm: it ends code and waiting alike, and leaves nothing behind."""

import os
import signal
import threading

import pytest

from proteingpt.data.time_limit import OutOfTime, time_limit


def spin() -> None:
    while True:
        try:
            sum(range(100))
        except Exception:  # as readers of damaged files do
            pass


def test_code_that_does_not_end_is_ended_whatever_it_catches():
    with pytest.raises(OutOfTime), time_limit(0.05):
        spin()


def test_waiting_for_bytes_that_do_not_come_is_ended(tmp_path):
    os.mkfifo(tmp_path / "nobody_writes")
    with pytest.raises(OutOfTime), time_limit(0.05):
        open(tmp_path / "nobody_writes", "rb")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_alarm_that_was_swallowed_comes_again():
    class Swallows:
        def __del__(self):
            spin()

    with pytest.raises(OutOfTime), time_limit(0.05):
        Swallows()
        spin()


def test_nothing_is_left_when_the_block_is_over():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(100):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) is before
    with time_limit(None):
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_thread_that_can_have_no_alarm_reads_without_one():
    done = []

    def work() -> None:
        with time_limit(0.001):
            done.append(sum(range(10**5)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [sum(range(10**5))]
