"""A thread on each rank that sees what the main thread cannot, while it waits for the others: signals, a launcher that
is gone, a rank that has fallen silent or failed, and a step that does not end.

The ranks tell each other through a key-value store beside the process group, so that what hangs does not carry the
news; by a second thread, which the store of a stopped rank 0 may keep waiting for ever. A run that hangs ends: the
Python stack of every rank is in RUN/stacks/, that of a stopped rank on the same machine too, and one message names who
is silent and what everybody was doing. A run that is told to stop while it loads or exports, which may take longer than
a launcher's patience, ends as well: nothing is lost by it.
"""

import faulthandler
import hashlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from proteingpt.distributed import Rank, from_first_rank
from proteingpt.training.signals import REQUEUE, Listener, StopRequest, is_gone, launchers, mark_requeue

log = logging.getLogger("proteingpt")

USER_ERROR = 1
HUNG = 75  # exit code (sysexits' EX_TEMPFAIL): starting again may help
FAILED = 70  # EX_SOFTWARE: ended because another rank did, or by an error that is not the user's
TICK_SECONDS = 0.5
SILENT_SECONDS = 10.0  # a rank whose watchdog has not been heard for so long is stopped, cut off or dead (at most)
# to come to a step, or to the end, before a stop ends what loads or exports: launchers kill after 30
LEAVE_SECONDS = 8.0
LOST_SECONDS = 60.0
STORE_SECONDS = 5.0  # that a word to the store may take when all are leaving
STACK_SIGNAL = signal.SIGUSR2


class Watchdog:
    """Of one rank. `beat` says that the main thread is alive, and what it is at; only within `watching` does its
    silence count, while that of a whole process counts always. hang_seconds: None for never. listener: one that listens
    already."""

    def __init__(self, rank: Rank, stop: StopRequest, hang_seconds: float | None, listener: Listener | None = None):
        self.rank, self.stop, self.hang_seconds = rank, stop, hang_seconds
        self.silent_seconds = min(SILENT_SECONDS, (hang_seconds or SILENT_SECONDS) / 2)
        self.directory: Path | None = None
        self.stacks = None
        self.doing, self.beaten, self.is_watching = "starting", time.monotonic(), False
        self.reading: Callable[[], str | None] = lambda: None
        self.read: str | None = None
        self.unwatched = self.beaten  # since when, while it is not watching
        self.ended, self.is_ending = threading.Event(), False
        self.heard: dict[int, tuple[dict, float]] = {}  # rank -> (what it said last, when that was new)
        self.others_beat = self.beaten  # of any rank, as it was told: one that waits for a slow one does not hang
        self.last_word: bytes | None = None
        self.talked = self.beaten  # when the store was last heard
        self.news: set[str] = set()  # "hung", "failed": what another rank has said of the run
        self.listener = listener or Listener()
        self.launchers = launchers() if rank.launcher != "none" else ()
        self.store = join_store(rank)
        self.threads = [threading.Thread(target=work, name="watchdog", daemon=True) for work in (self.run, self.talk)]
        for thread in self.threads:
            thread.start()

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
    def watching(self, reading: Callable[[], str | None] = lambda: None):
        """reading: what the data's reader is at, in words that change as it gets on: a slow download is no hang."""
        self.beat("begins")
        self.reading, self.is_watching = reading, True
        try:
            yield
        finally:
            self.unwatched, self.is_watching = time.monotonic(), False

    def beat(self, doing: str):
        self.doing, self.beaten = doing, time.monotonic()

    def says_first(self, message: str) -> bool:
        """Whether no other rank has claimed this message: what all find out is said once."""
        try:
            return self.store is None or self.store.add(f"said {hash_of(message)}", 1) == 1
        except RuntimeError:  # the store went with rank 0
            return True

    def fail(self, code: int):
        """Tell the others that this rank is ending, and how, so that none waits for it."""
        with suppress(RuntimeError):
            if self.store is not None:
                self.store.set("failed", str(code))

    def code_of_failed(self) -> int:
        """The exit code of the rank that failed, which may not have said it yet."""
        deadline = time.monotonic() + 2 * TICK_SECONDS
        with suppress(RuntimeError):
            while self.store is not None and time.monotonic() < deadline:
                if self.store.check(["failed"]):
                    return int(self.store.get("failed"))
                time.sleep(0.02)
        return FAILED

    def close(self):
        if self.ended.is_set():
            return
        self.ended.set()
        for thread in self.threads:
            thread.join(STORE_SECONDS)
        self.listener.close()
        if self.stacks is not None:
            faulthandler.unregister(STACK_SIGNAL)
            self.stacks.close()
            path = Path(self.stacks.name)
            if path.stat().st_size == 0:
                path.unlink()
            with suppress(OSError):  # another rank's is not empty, or it was removed with it
                path.parent.rmdir()

    # ----------------------------------------------------------------------------------------------- its threads

    def run(self):
        while not self.ended.is_set():
            select.select([self.listener.descriptor], [], [], TICK_SECONDS)
            name = self.listener.received()
            if name:
                self.stop.ask(name)
            if self.launchers and is_gone(self.launchers):
                self.stop.ask("the launcher is gone")
            self.look_at_reader()
            if "failed" in self.news:
                self.end_with_another()
            now = time.monotonic()
            if "hung" in self.news or self.hang_seconds and (self.has_lost_one(now) or self.is_stuck(now)):
                self.end_hung()
            if self.stop and not self.is_watching and now - max(self.stop.asked_at, self.unwatched) > LEAVE_SECONDS:
                self.end_unsaved()

    def look_at_reader(self):
        before, self.read = self.read, self.reading()
        if self.is_watching and self.read and self.read != before:
            self.beaten = time.monotonic()

    def is_stuck(self, now: float) -> bool:
        return self.is_watching and now - self.latest_beat > self.hang_seconds

    @property
    def latest_beat(self) -> float:
        return max(self.beaten, self.others_beat)

    def has_lost_one(self, now: float) -> bool:
        """Whether a process that this one would wait for has given no sign of life for hang_seconds, a minute at least:
        loading may hold Python's lock for seconds."""
        seconds = max(self.hang_seconds, LOST_SECONDS)
        return bool(silent_ranks(self.heard, now, seconds)) or self.first_is_silent(now, seconds)

    def first_is_silent(self, now: float, seconds: float) -> bool:
        return self.store is not None and now - self.talked > seconds

    def talk(self):
        while self.store is not None and not self.ended.wait(TICK_SECONDS):
            with suppress(RuntimeError):  # torch's DistError: the store, which rank 0 keeps, is gone
                self.exchange()
                self.talked = time.monotonic()

    def exchange(self):
        """Say how this rank is, hear how the others are."""
        now = time.monotonic()
        mine = {
            "doing": self.doing, "for": round(now - self.beaten, 1), "pid": os.getpid(), "host": socket.gethostname(),
            "stop": self.stop.reason, "tick": now,
        }  # fmt: skip
        self.store.set(f"rank {self.rank.rank}", json.dumps(mine))
        if self.stop and not self.store.check(["stop"]):
            self.store.set("stop", f"{self.stop.reason} (rank {self.rank.rank})")
        if not self.stop and self.store.check(["stop"]):
            self.stop.ask(self.store.get("stop").decode())
        self.news |= {key for key in ("hung", "failed") if self.store.check([key])}
        self.hear_others(now)
        self.hear_of_latest_beat(now)

    def hear_others(self, now: float):
        """Rank 0 alone: with hundreds of ranks each would ask for all."""
        if not self.rank.is_first:
            return
        for rank in range(self.rank.world_size):
            key = f"rank {rank}"
            if self.store.check([key]):
                said = json.loads(self.store.get(key))
                if rank not in self.heard or self.heard[rank][0]["tick"] != said["tick"]:
                    self.heard = {**self.heard, rank: (said, now)}  # anew, since the other thread reads it
        if self.heard:
            self.store.set("quiet", json.dumps([least_quiet(self.heard, now), now]))

    def hear_of_latest_beat(self, now: float):
        """Told by rank 0. Once it falls silent, its last word must not be taken for a new one."""
        word = self.store.get("quiet") if self.store.check(["quiet"]) else None
        if word and word != self.last_word:
            self.last_word = word
            self.others_beat = max(self.others_beat, now - json.loads(word)[0])

    def end_with_another(self):
        """Another rank failed, and said why: end soon, if the main thread has not noticed by itself."""
        if not self.ended.wait(5.0):
            os._exit(FAILED)

    def end_unsaved(self):
        self.is_ending = True
        time.sleep(4 * TICK_SECONDS)  # until the others are ending too, and none complains of another
        if self.rank.is_first:
            if self.directory is not None:
                mark_requeue(self.directory.parent, self.stop.reason)
            log.info(
                "stopped by %s while there was nothing to save; the same command goes on (exit code %d)",
                self.stop.reason, REQUEUE,
            )  # fmt: skip
        os._exit(REQUEUE)

    def end_hung(self):
        self.is_ending = True
        now = time.monotonic()
        silent = silent_ranks(self.heard, now, self.silent_seconds)
        message = hang_message(
            {rank: (said, now - when) for rank, (said, when) in self.heard.items()}, silent, now - self.latest_beat
        )
        speaks, no_first = self.rank.is_first, self.first_is_silent(now, self.silent_seconds)
        if no_first:  # which would speak
            speaks = self.rank.rank == 1
            message += "; rank 0 does not answer: it is stopped, cut off or dead"
        self.write_stack()
        if speaks:
            self.wake_silent()
            print(f"error: {message}. Stacks are in {self.directory}", file=sys.stderr, flush=True)
        with suppress(RuntimeError):
            if self.store is not None and not no_first:
                self.store.set("hung", "1")
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
        f"rank {rank} (pid {said['pid']} on {said['host']}) has given no sign of life for {since:.0f} s, it is "
        f"stopped, cut off or dead; it was at: {said['doing']}"
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
