"""Who works on what, among processes that share nothing but a directory: ranks of a launch, tasks of a SLURM array, or
commands started by hand, on any node, at any time.

A claim is a file that only one can create, with its owner's name in it, written anew every few seconds. One that stood
still for LEASE_SECONDS of the observer's own clock, or whose process is gone from the observer's own machine, is
overtaken by creating the one with the next number. Locks are not used, which shared disks may not have, nor clocks of
two machines. Given up: certainty. A process that only slept may work on beside the one that overtook it, so what is
done under a claim must be harmless if it is done twice.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

BEAT_SECONDS, LEASE_SECONDS, POLL_SECONDS = 5.0, 60.0, 0.5
CONTENT_BYTES = 512  # of every claim, so that one that is written anew is never shorter than it was


@cache
def machine() -> str:
    """One kernel's one space of process ids, until it boots again; "" where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """When the process of this machine began, in the kernel's ticks, since ids are used again; None of one that is
    gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def is_gone(owner: dict) -> bool:
    """Whether it is known for sure, which it is on the owner's machine only."""
    return bool(machine()) and owner.get("machine") == machine() and started(owner["pid"]) != owner["started"]


class Claim:
    """A piece of work that this process has taken. done: what it says of its progress."""

    def __init__(self, path: Path, done: Callable[[], int]):
        self.path, self.done, self.beats, self.id = path, done, 0, uuid.uuid4().hex

    @property
    def is_ours(self) -> bool:
        """False once another process has taken this one for dead."""
        return parsed(read(self.path) or b"").get("id") == self.id

    def content(self) -> bytes:
        pid, self.beats = os.getpid(), self.beats + 1
        owner = {"id": self.id, "host": socket.gethostname(), "machine": machine(), "pid": pid, "started": started(pid)}
        return json.dumps({**owner, "beat": self.beats, "done": self.done()}).encode().ljust(CONTENT_BYTES)

    def beat_until(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            # A disk that gives nothing for a while is no reason to stop: at worst another overtakes.
            with contextlib.suppress(OSError):
                if self.is_ours:
                    with open(self.path, "r+b") as file:
                        file.write(self.content())


class Claims:
    """Of this process, in `directory`, which comes and goes with them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._seen: dict[Path, tuple[bytes, float]] = {}  # claims of others, and since when they read so

    @contextlib.contextmanager
    def claim(self, name: str, done: Callable[[], int] = lambda: 0) -> Iterator[Claim | None]:
        """While within, the work called `name` is this process's; None where it is another's, who seems to be alive."""
        claim = self._create(name, done)
        if claim is None:
            yield None
            return
        ended = threading.Event()
        thread = threading.Thread(target=claim.beat_until, args=(ended,), daemon=True)
        thread.start()
        try:
            yield claim
        finally:
            ended.set()
            thread.join()
            self._remove([claim.path] if claim.is_ours else [])

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """As `claim`, and waits until it is this process's turn."""
        while True:
            with self.claim(name) as claim:
                if claim is not None:
                    yield
                    return
            time.sleep(POLL_SECONDS)

    def owners(self) -> dict[str, dict]:
        """{name: what its newest claim says}, of all work that is claimed by processes not known to be gone."""
        found = {}
        for path in sorted(self._paths(), key=number_of):
            content = read(path)
            if content is not None and not is_gone(owner := parsed(content)):
                found[path.stem] = owner
        return found

    def clear(self) -> None:
        """Forgets every claim: there is no work left."""
        self._remove(self._paths())

    def _create(self, name: str, done: Callable[[], int]) -> Claim | None:
        older = sorted((path for path in self._paths() if path.stem == name), key=number_of)
        if older and self._is_alive(older[-1]):
            return None
        claim = Claim(self.directory / f"{name}.{number_of(older[-1]) + 1 if older else 0}", done)
        self.directory.mkdir(exist_ok=True)
        try:
            file = open(claim.path, "xb", buffering=0)
        except (FileExistsError, FileNotFoundError):  # another was faster, or has just removed the empty directory
            return None
        try:
            with file:
                file.write(claim.content())
        except OSError:
            self._remove([claim.path])
            raise
        self._remove(older)
        return claim

    def _is_alive(self, path: Path) -> bool:
        content, now = read(path), time.monotonic()
        if content is None or is_gone(parsed(content)):
            return False
        if self._seen.get(path, (None, 0))[0] != content:
            self._seen[path] = content, now
        return now - self._seen[path][1] < LEASE_SECONDS

    def _paths(self) -> list[Path]:
        try:
            return [path for path in self.directory.iterdir() if path.suffix[1:].isdigit()]
        except FileNotFoundError:
            return []

    def _remove(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there are others in it
            self.directory.rmdir()


def read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def number_of(path: Path) -> int:
    return int(path.suffix[1:])


def parsed(content: bytes) -> dict:
    """What a claim says; nothing of one that is being written."""
    try:
        return json.loads(content)
    except ValueError:
        return {}
