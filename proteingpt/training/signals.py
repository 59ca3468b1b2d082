"""A wish to stop: a signal, or a launcher that is gone. The ranks agree on it between steps, save and exit with
REQUEUE.

Agreement costs no waiting: each step a byte is reduced in the background, by gloo in a group of its own, and read one
step later. So all ranks stop after the same step, whichever of them was told.
"""

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Exit code of a run that saved itself and can be started again: a batch script requeues on it.
REQUEUE = 85
REQUEUE_MARK = "requeue"  # RUN/requeue is there while the run has stopped on a signal and waits to be started again
EARLY_TICK_SECONDS = 0.1
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """The ranks have agreed to stop after this step. Raised on every rank."""


class StopRequest:
    """Whether this rank was asked to stop, and why. Set by the watchdog's thread, read by the main one."""

    def __init__(self):
        self.reason, self.asked_at = "", math.inf
        self.asked = threading.Event()

    def ask(self, reason: str):
        self.reason, self.asked_at = self.reason or reason, min(self.asked_at, time.monotonic())
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

    def ignore(self):
        """From now on, and after `close`, the signals change nothing; but for Ctrl-C."""
        for number in self.before.keys() - {signal.SIGINT}:
            self.before[number] = signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN)

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup_before)
        os.close(self.descriptor)
        os.close(self.write_end)


def mark_requeue(run: Path, reason: str):
    """A full disk costs the mark; the exit code says the same."""
    with suppress(OSError):
        (run / REQUEUE_MARK).write_text(f"{reason}\n", encoding="utf-8")


class Early:
    """From the first line of a process until its watchdog listens: nothing has been begun that could be lost, so a
    signal ends it at once, with REQUEUE. Its own end would be 143, which no batch script requeues on."""

    def __init__(self):
        self.listener, self.is_over = Listener(), threading.Event()
        self.thread = threading.Thread(target=self.watch, name="early", daemon=True)
        self.thread.start()

    def watch(self):
        while not self.is_over.is_set():
            select.select([self.listener.descriptor], [], [], EARLY_TICK_SECONDS)
            name = self.listener.received()
            if name:
                print(f"stopped by {name} before anything had begun (exit code {REQUEUE})", file=sys.stderr, flush=True)
                os._exit(REQUEUE)

    def hand_over(self) -> Listener:
        """What listens goes on, for another to read."""
        self.is_over.set()
        self.thread.join()
        return self.listener


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
