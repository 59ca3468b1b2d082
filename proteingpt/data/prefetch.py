"""Steps read ahead by one thread, which is watched: what it raises comes where it would have been read, and a file at
which it is stuck is named.

A thread rather than processes: it makes packs far faster than they are trained on, and hands them over as they are
(benchmarks/loader.py has both).
"""

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from proteingpt.data.shard_cache import Activity
from proteingpt.data.shard_format import ShardError

Item = TypeVar("Item")

log = logging.getLogger("proteingpt")

# The first word about waiting; then at twice the time, and so on.
SHOW_AFTER_SECONDS = 5.0


class ReadTimeout(ShardError):
    """A file has given nothing for too long."""


def prefetch(
    make: Callable[[int], Item],
    first: int,
    last: int,
    depth: int = 4,
    *,
    timeout_seconds: float = float("inf"),
    activity: Activity = Activity(),
) -> Iterator[Item]:
    """make(first) .. make(last - 1) in order, made ahead by a thread. Its error is raised where it would have been
    read; leaving the iterator early ends the thread.

    activity: what the reader is at. While the consumer waits it is shown in the log, and where it is at one file and
    the words have not changed for timeout_seconds, ReadTimeout is raised with them; the blocked thread is left behind.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        for step in range(first, last):
            try:
                item = (make(step), None)
            except BaseException as error:  # handed over whole: the consumer decides
                item = (None, error)
            if not put(item) or item[1] is not None:
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    # A thread that is stuck at a file must not keep a run from ending.
    patience = None if math.isinf(timeout_seconds) else timeout_seconds
    try:
        for step in range(first, last):
            value, error = wait_for(ready, thread, step, activity, timeout_seconds)
            if error is not None:
                patience = 0.0 if isinstance(error, ReadTimeout) else patience
                raise error
            yield value
    finally:
        stopped.set()
        thread.join(patience)


def wait_for(ready: queue.Queue, thread: threading.Thread, step: int, activity: Activity, timeout_seconds: float):
    """The next (value, error) of the reading thread. The error is ReadTimeout where it is stuck at a file."""
    with contextlib.suppress(queue.Empty):
        return ready.get_nowait()
    said, show_after = activity.text, SHOW_AFTER_SECONDS
    began = changed = time.monotonic()
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=min(1.0, timeout_seconds / 4))
        now, doing = time.monotonic(), activity.text
        if doing != said:
            said, changed = doing, now
        if not thread.is_alive() and ready.empty():
            return None, RuntimeError(f"the reading thread has died before step {step}")
        if doing and now - changed > timeout_seconds:
            return None, ReadTimeout(
                f"step {step} waits for data: nothing came for {now - changed:.0f} s from {doing}. Is the storage up? "
                f"If it is that slow, raise data.read_timeout_seconds ({timeout_seconds:g})"
            )
        if now - began > show_after:
            show_after *= 2
            log.warning("step %d has been waiting for data for %.0f s: %s", step, now - began, doing or "being planned")
