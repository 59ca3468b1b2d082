"""A wish to stop: a signal, or a launcher that is gone. The ranks agree on it between steps, save and exit with REQUEUE.

Agreement costs no waiting: each step a byte is reduced in the background, by gloo in a group of its own, and read one
step later. So all ranks stop after the same step, whichever of them was told.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

# Exit code of a run that saved itself and can be started again: a batch script requeues on it.
REQUEUE = 85
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """The ranks have agreed to stop after this step. Raised on every rank."""


class StopRequest:
    """Whether this rank was asked to stop, and why. Set by the watchdog's thread, read by the main one."""

    def __init__(self):
        self.reason = ""
        self.asked = threading.Event()

    def ask(self, reason: str):
        self.reason = self.reason or reason
        self.asked.set()

    def __bool__(self) -> bool:
        return self.asked.is_set()


class Listener:
    """Catches the signals that ask for a stop. They are read from a pipe, so that they are seen at once, also while the
    main thread waits in a collective, where Python's own handlers do not run. A second Ctrl-C ends the process."""

    def __init__(self, wanted=STOPPING):
        self.descriptor, self.write_end = os.pipe()
        for end in (self.descriptor, self.write_end):
            os.set_blocking(end, False)
        self.wakeup_before = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self.handle) for number in wanted}

    def handle(self, number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def received(self) -> str | None:
        """The name of a signal that has come since, None if there was none."""
        try:
            numbers = os.read(self.descriptor, 64)
        except BlockingIOError:
            return None
        names = [signal.Signals(number).name for number in numbers if number in self.before]
        return names[0] if names else None

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup_before)
        os.close(self.descriptor)
        os.close(self.write_end)


def launchers(proc: Path = Path("/proc")) -> tuple[int, ...]:
    """Process ids of what started this rank: its parent, and the `deepspeed` command above DeepSpeed's per-node
    launcher. Where one of them changes, it is gone: an orphan is given to another parent."""
    parent = os.getppid()
    try:
        command = (proc / str(parent) / "cmdline").read_bytes()
        above = (proc / str(parent) / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return (parent,)
    return (parent, int(above)) if b"deepspeed.launcher.launch" in command else (parent,)


class Agreement:
    """agreed(flag), called by every rank after each step: whether any rank had a true flag one call before."""

    def __init__(self, world_size: int):
        self.group = self.pending = None
        if world_size > 1:
            import torch.distributed as dist

            self.group = dist.new_group(backend="gloo")

    def __call__(self, flag: bool) -> bool:
        """With one rank it is that rank's flag."""
        if self.group is None:
            return flag
        agreed = self.settle()
        self.launch(flag)
        return agreed

    def settle(self) -> bool:
        if self.pending is None:
            return False
        work, box = self.pending
        work.wait()
        self.pending = None
        return bool(box.item())

    def launch(self, flag: bool):
        import torch
        import torch.distributed as dist

        box = torch.tensor([int(flag)], dtype=torch.uint8)
        self.pending = dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.group, async_op=True), box

    def now(self, flag: bool) -> bool:
        """The same, waited for: after something long, such as an evaluation."""
        if self.group is None:
            return flag
        before = self.settle()
        self.launch(flag)
        return self.settle() or before

    def close(self):
        self.settle()


def is_gone(known: tuple[int, ...], look: Callable[[], tuple[int, ...]] = launchers) -> bool:
    """Whether a launcher of `known` is no longer above this process."""
    return look()[: len(known)] != known
