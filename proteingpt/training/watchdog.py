"""A thread on each rank that sees what the main thread cannot, while it waits for the others: signals, a launcher that
is gone, a rank that has fallen silent or failed, and a step that does not end.

The ranks tell each other through a key-value store beside the process group, so that what hangs does not carry the
news. A run that hangs ends: the Python stack of every rank is in RUN/stacks/, that of a stopped rank on the same machine
too, and one message names who is silent and what everybody was doing.
"""

import faulthandler
import hashlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from proteingpt.distributed import Rank, from_first_rank
from proteingpt.training.signals import Listener, StopRequest, is_gone, launchers

HUNG = 75  # exit code (sysexits' EX_TEMPFAIL): starting again may help
FAILED = 70  # EX_SOFTWARE: ended because another rank did, or by an error that is not the user's
TICK_SECONDS = 0.5
SILENT_SECONDS = 10.0  # a rank whose watchdog has not been heard for so long is stopped, cut off or dead (at most)
STACK_SIGNAL = signal.SIGUSR2


class Watchdog:
    """Of one rank. `beat` says that the main thread is alive, and what it is at; only between `watching` and the end of
    it does its silence count. hang_seconds: None for never."""

    def __init__(self, rank: Rank, stop: StopRequest, hang_seconds: float | None):
        self.rank, self.stop, self.hang_seconds = rank, stop, hang_seconds
        self.silent_seconds = min(SILENT_SECONDS, (hang_seconds or SILENT_SECONDS) / 2)
        self.directory: Path | None = None
        self.stacks = None
        self.doing, self.beaten, self.is_watching = "starting", time.monotonic(), False
        self.ended, self.is_ending = threading.Event(), False
        self.heard: dict[int, tuple[dict, float]] = {}  # rank -> (what it said last, when that was new)
        self.latest_beat = self.beaten  # of any rank, as far as is known here: one that waits for a slow one does not hang
        self.last_word: bytes | None = None
        self.lost_store_at: float | None = None
        self.listener = Listener()
        self.launchers = launchers() if rank.launcher != "none" else ()
        self.store = join_store(rank)
        self.thread = threading.Thread(target=self.run, name="watchdog", daemon=True)
        self.thread.start()

    # ------------------------------------------------------------------------------------- for the main thread

    def keep_stacks_in(self, directory: Path):
        """From now on stacks are written there, also for another rank that asks by STACK_SIGNAL."""
        self.directory = directory / "stacks"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.stacks = open(self.directory / f"rank-{self.rank.rank}.txt", "w", encoding="utf-8")
            faulthandler.register(STACK_SIGNAL, file=self.stacks, all_threads=True)
        except OSError as error:
            print(f"stacks cannot be kept: {error}", file=sys.stderr, flush=True)

    @contextmanager
    def watching(self):
        self.beat("begins")
        self.is_watching = True
        try:
            yield
        finally:
            self.is_watching = False

    def beat(self, doing: str):
        self.doing, self.beaten = doing, time.monotonic()

    def says_first(self, message: str) -> bool:
        """Whether no other rank has claimed this message: what all find out is said once."""
        try:
            return self.store is None or self.store.add(f"said {hash_of(message)}", 1) == 1
        except RuntimeError:  # the store went with rank 0
            return True

    def fail(self):
        """Tell the others that this rank is ending, so that none waits for it."""
        try:
            if self.store is not None:
                self.store.set("failed", str(self.rank.rank))
        except RuntimeError:
            pass

    def close(self):
        if self.ended.is_set():
            return
        self.ended.set()
        self.thread.join()
        self.listener.close()
        if self.stacks is not None:
            faulthandler.unregister(STACK_SIGNAL)
            self.stacks.close()
            path = Path(self.stacks.name)
            if path.stat().st_size == 0:
                path.unlink()
            with suppress(OSError):  # another rank's is not empty, or it was removed with it
                path.parent.rmdir()

    # ------------------------------------------------------------------------------------------------ its thread

    def run(self):
        while not self.ended.is_set():
            select.select([self.listener.descriptor], [], [], TICK_SECONDS)
            name = self.listener.received()
            if name:
                self.stop.ask(name)
            if self.launchers and is_gone(self.launchers):
                self.stop.ask("the launcher is gone")
            self.exchange()
            self.latest_beat = max(self.latest_beat, self.beaten)
            if self.hang_seconds and self.is_watching and time.monotonic() - self.latest_beat > self.hang_seconds:
                self.end_hung()

    def exchange(self):
        """Say how this rank is, hear how the others are."""
        if self.store is None:
            return
        now = time.monotonic()
        mine = {
            "doing": self.doing, "for": round(now - self.beaten, 1), "pid": os.getpid(), "host": socket.gethostname(),
            "stop": self.stop.reason, "tick": now,
        }  # fmt: skip
        try:
            self.store.set(f"rank {self.rank.rank}", json.dumps(mine))
            if self.stop and not self.store.check(["stop"]):
                self.store.set("stop", f"{self.stop.reason} (rank {self.rank.rank})")
            if not self.stop and self.store.check(["stop"]):
                self.stop.ask(self.store.get("stop").decode())
            for key, end in (("hung", self.end_hung), ("failed", self.end_with_another)):
                if self.store.check([key]):
                    end()
            self.hear_others(now)
            self.hear_of_latest_beat(now)
            self.lost_store_at = None
        except RuntimeError:  # torch's DistError: the store, which rank 0 keeps, is gone or stopped
            self.lost_store_at = self.lost_store_at or now

    def hear_others(self, now: float):
        """Rank 0 alone: with hundreds of ranks each would ask for all."""
        if not self.rank.is_first:
            return
        for rank in range(self.rank.world_size):
            key = f"rank {rank}"
            if self.store.check([key]):
                said = json.loads(self.store.get(key))
                if rank not in self.heard or self.heard[rank][0]["tick"] != said["tick"]:
                    self.heard[rank] = said, now
        if self.heard:
            self.store.set("quiet", json.dumps([least_quiet(self.heard, now), now]))

    def hear_of_latest_beat(self, now: float):
        """Told by rank 0. Once it falls silent, its last word must not be taken for a new one."""
        word = self.store.get("quiet") if self.store.check(["quiet"]) else None
        if word and word != self.last_word:
            self.last_word = word
            self.latest_beat = max(self.latest_beat, now - json.loads(word)[0])

    def end_with_another(self):
        """Another rank failed, and said why: end soon, if the main thread has not noticed by itself."""
        if not self.ended.wait(5.0):
            os._exit(FAILED)

    def end_hung(self):
        self.is_ending = True
        now = time.monotonic()
        silent = silent_ranks(self.heard, now, self.silent_seconds)
        message = hang_message(
            {rank: (said, now - when) for rank, (said, when) in self.heard.items()}, silent, now - self.latest_beat
        )
        speaks = self.rank.is_first
        if self.lost_store_at is not None:  # rank 0, which would speak, does not answer
            speaks = self.rank.rank == 1
            message += "; rank 0 does not answer: it is stopped, cut off or dead"
        self.write_stack()
        if speaks:
            self.wake_silent()
            print(f"error: {message}. Stacks are in {self.directory}", file=sys.stderr, flush=True)
        try:
            if self.store is not None and self.lost_store_at is None:
                self.store.set("hung", "1")
        except RuntimeError:
            pass
        time.sleep(4 * TICK_SECONDS)  # for the others to hear of it, from the store that rank 0 keeps
        os._exit(HUNG)

    def write_stack(self):
        if self.stacks is not None:
            self.stacks.write(f"rank {self.rank.rank}, {self.doing}, for {time.monotonic() - self.beaten:.0f} s\n")
            self.stacks.flush()
            faulthandler.dump_traceback(file=self.stacks, all_threads=True)

    def wake_silent(self):
        """Silent ranks on this machine write their stacks in a signal handler of C, even while they hang, or when woken
        for it; and are then ended, or they would hold their devices."""
        silent = silent_ranks(self.heard, time.monotonic(), self.silent_seconds)
        pids = [self.heard[rank][0]["pid"] for rank in silent if self.heard[rank][0]["host"] == socket.gethostname()]
        for signals, pause in (((STACK_SIGNAL, signal.SIGCONT), 0.5), ((signal.SIGKILL,), 0.0)):
            for pid in pids:
                for number in signals:
                    send(pid, number)
            time.sleep(pause)


def send(pid: int, number: int):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def silent_ranks(heard: dict[int, tuple[dict, float]], now: float, seconds: float) -> list[int]:
    """heard: {rank: (what it said last, when that was new)}."""
    return sorted(rank for rank, (_, when) in heard.items() if now - when > seconds)


def least_quiet(heard: dict[int, tuple[dict, float]], now: float) -> float:
    """Seconds since any rank has last gone on. heard: as above."""
    return min(said["for"] + now - when for said, when in heard.values())


def hang_message(heard: dict[int, tuple[dict, float]], silent: list[int], seconds: float) -> str:
    """Who is silent, and what everybody is at. heard: {rank: (what it said last, seconds since)}."""
    parts = [
        f"rank {rank} (pid {said['pid']} on {said['host']}) has given no sign of life for {since:.0f} s, it is stopped, "
        f"cut off or dead; it was at: {said['doing']}"
        if rank in silent
        else f"rank {rank} is at: {said['doing']}"
        for rank, (said, since) in sorted(heard.items(), key=lambda item: (item[0] not in silent, item[0]))
    ]
    found = f"the run hangs: nothing has gone on for {seconds:.0f} s (devices.hang_seconds)"
    return "; ".join([found, *parts, "the same command goes on from the last checkpoint"])


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def join_store(rank: Rank):
    """A store of our own, kept by rank 0 on a free port: the process group's serves those who wait in it. None for one
    rank. A collective."""
    if rank.world_size == 1:
        return None
    from torch.distributed import TCPStore

    options = {"wait_for_workers": False, "timeout": timedelta(seconds=SILENT_SECONDS)}
    server = TCPStore(rank.master_addr, 0, is_master=True, **options) if rank.is_first else None
    port = from_first_rank(server.port if server else None)
    return server or TCPStore(rank.master_addr, port, is_master=False, **options)
