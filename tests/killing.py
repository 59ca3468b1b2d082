"""SIGKILL at a chosen touch of a file, for what must go on where it was killed."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def killed_at(last_event: int | None, out: Path, work: Callable[[], object]) -> bool:
    """Does `work()` in a child that SIGKILLs itself at its last_event-th touch of a file in `out` (None: never);
    whether it came so far."""
    child = os.fork()
    if child == 0:
        num_events = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal num_events
            if event in EVENTS and arguments and str(arguments[0]).startswith(str(out)):
                num_events += 1
                if num_events == last_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(count)
            work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"it failed of itself: {status}"
    return status == signal.SIGKILL


def content(directory: Path) -> dict[str, bytes]:
    """{path: bytes} of all files in it."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
