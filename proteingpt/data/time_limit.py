"""A bound on the time that reading one file may take, so that one file never stalls a build.

By the process's own alarm, which ends Python code and blocked reads alike; a process that has none (a thread other than
the main one) reads without a bound. Given up: ending a single call into C that lasts for minutes.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class OutOfTime(BaseException):
    """Not an Exception: readers catch those, and would take it for a fault of the file."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises OutOfTime in the block once it has taken so many seconds (None: never). Not to be nested."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number, frame) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, ring)
    try:
        # Again each second or more: Python swallows what is raised while it cleans up an object.
        signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, 1.0))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # a second time, since the alarm may ring just before it is turned off
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
