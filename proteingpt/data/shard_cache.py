"""A bounded directory of shards that ranks and runs share, and what a reader is at.

What lies there is named by its sha256: what has its final name has been verified. Locks are files, which a process that
dies gives back. Given up: knowing what other runs will need; they find the oldest of theirs gone.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from proteingpt.config import DataConfig
from proteingpt.data.shard_format import ShardError
from proteingpt.data.tar_headers import hostile_member

log = logging.getLogger("proteingpt")

CHUNK_BYTES = 1 << 20
POLL_SECONDS = 0.1


class Activity:
    """What a reader is at, in words that change as it gets on; None between reads. Another thread looks at it."""

    text: str | None = None


class ShardCache:
    """A directory of at most max_bytes of shards. Ranks of a node share it: a lock on a file for each shard, another
    for room. A process that dies gives its locks back."""

    def __init__(self, directory: str | Path | None = None, max_bytes: int | None = None):
        """By default as a recipe has them by default."""
        config = DataConfig()
        self.directory = Path(directory or config.cache_dir)
        self.max_bytes = max_bytes or int(config.cache_gib * 2**30)
        self._warned = False
        try:
            for name in ("locks", "verified"):
                (self.directory / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{error.strerror}: give a directory to write to"
            raise ShardError(f"data.cache_dir {self.directory}: {reason}") from error

    def get(
        self, shard: dict, name: str, fetch: Callable[[Path], None], keep: list[str], activity: Activity, needed: bool,
        stopped: threading.Event,
    ) -> Path | None:  # fmt: skip
        """The shard's file, fetched by `fetch(partial file)` where it is not there. keep: sha256 of the shards that
        will be needed soon, soonest first. Not `needed`: None where another process is at it, or there is no room."""
        path = self.directory / f"{shard['sha256']}.tar"
        if self._touch(path):
            return path
        with self._lock(shard["sha256"]) as lock:
            while not lock():
                if not needed or stopped.is_set():
                    return None
                partial = partial_of(path)
                so_far = megabytes(written(partial))
                activity.text = f"shard {name}, which another process is fetching ({so_far} MB so far)"
                time.sleep(POLL_SECONDS)
            if self._touch(path):
                return path
            partial = partial_of(path)
            while not self._make_room(shard["num_bytes"], partial, name, keep, needed):
                if not needed or stopped.is_set():
                    return None
                activity.text = f"shard {name}, waiting for others to leave room in {self.directory}"
                time.sleep(POLL_SECONDS)
            try:
                fetch(partial)
                refuse_hostile(partial, name)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def remove(self, sha256: str):
        (self.directory / f"{sha256}.tar").unlink(missing_ok=True)

    def verify(self, path: Path, sha256: str, activity: Activity):
        """Compares a local shard with its sha256, once for each version of the file. A wrong one is named in the log:
        its samples have checksums of their own."""
        record = self.directory / "verified" / hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
        if read_json(record) == version_of(path, sha256):
            return
        with self._lock(record.name) as lock:
            while not lock():
                activity.text = f"shard {path}, which another process is verifying"
                time.sleep(POLL_SECONDS)
            version = version_of(path, sha256)
            if version is None or read_json(record) == version:
                return
            found = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    found.update(chunk)
                    activity.text = f"shard {path}, verifying it: {megabytes(file.tell())} MB"
            refuse_hostile(path, str(path))
            if found.hexdigest() == sha256:
                record.write_text(json.dumps(version))
            else:
                log.warning("shard %s: its sha256 is not the manifest's: copy it again; the broken is set aside", path)

    def _touch(self, path: Path) -> bool:
        """Whether it is there; then it has been needed just now."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, num_bytes: int, partial: Path, name: str, keep: list[str], needed: bool) -> bool:
        """Leaves num_bytes for `partial`, by removing what was needed longest ago, and only where it is `needed` what
        will be needed soon, the latest first. The partial file is made in its full size, so that others count it."""
        if num_bytes > self.max_bytes:
            raise ShardError(
                f"shard {name} has {num_bytes} bytes, data.cache_gib holds {self.max_bytes}: raise it, or build "
                "smaller shards"
            )
        with self._lock("room") as lock:
            while not lock():
                time.sleep(POLL_SECONDS / 10)
            self._remove_leftovers()
            files = sorted((stat.st_mtime_ns, stat.st_size, path.stem) for path, stat in self._files(".tar"))
            total = sum(size for _, size, _ in files) + sum(stat.st_size for _, stat in self._files(".tar.partial"))
            oldest_first = [(stem, size) for _, size, stem in files]
            evicted, excess = choose_evicted(oldest_first, total + num_bytes - self.max_bytes, keep, needed)
            if excess > 0:
                return False
            if not self._warned and set(evicted) & set(keep):
                self._warned = True
                log.warning(
                    "data.cache_gib (%.1f GiB) holds less than the shards that are read at a time, which are fetched "
                    "again and again: raise it, or lower data.shards_per_window", self.max_bytes / 2**30,
                )  # fmt: skip
            for sha256 in evicted:
                self.remove(sha256)
            with open(partial, "wb") as file:
                file.truncate(num_bytes)
        return True

    def _remove_leftovers(self):
        """Partial files of processes that died: nobody holds their lock."""
        for path, _ in self._files(".tar.partial"):
            with self._lock(path.name.partition(".")[0]) as lock:
                if lock():
                    path.unlink(missing_ok=True)

    def _files(self, ending: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Of shards only: token ids lie beside them."""
        for path in self.directory.glob(f"{'[0-9a-f]' * 64}{ending}"):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[Callable[[], bool]]:
        """Gives a function that tries to take the lock, held until the end of the block."""
        with open(self.directory / "locks" / name, "wb") as file:
            yield lambda: try_lock(file.fileno())


def refuse_hostile(path: Path, name: str):
    """Nothing here extracts a tar, but people do."""
    if fault := hostile_member(path):
        raise ShardError(f"shard {name}: {fault}: it was not made by launch/build_shards.py")


def choose_evicted(
    oldest_first: list[tuple[str, int]], excess: int, keep: list[str], needed: bool
) -> tuple[list[str], int]:
    """Which of the (name, bytes) to remove to get rid of `excess` bytes, and what is left of it (<= 0: enough).

    First what is not to be kept, oldest first; then, where the room is needed now, what is to be kept, the latest
    needed first."""
    place = {name: number for number, name in enumerate(keep)}
    free = [(name, size) for name, size in oldest_first if name not in place]
    kept = sorted([(name, size) for name, size in oldest_first if name in place], key=lambda item: -place[item[0]])
    chosen = []
    for name, size in [*free, *(kept if needed else [])]:
        if excess <= 0:
            break
        chosen.append(name)
        excess -= size
    return chosen if excess <= 0 else [], excess


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def written(path: Path) -> int:
    """Bytes of a file that are there, holes left out."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def version_of(path: Path, sha256: str) -> dict | None:
    """What tells that a file is still the one that was verified; None where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return {"sha256": sha256, "num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def read_json(path: Path):
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f}"
