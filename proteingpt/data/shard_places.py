"""Where shards lie: in a directory (`Here`), or at an address that fsspec knows (`There`), from a bounded cache.

What is in the cache is named by its sha256, so runs, splits and ranks share it, and what has its final name has been
verified. http(s) goes through proteingpt.web, since fsspec's own needs another package. Given up: resuming a download
in its middle; a shard is fetched whole or not.
"""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from proteingpt import web
from proteingpt.config.addresses import without_secrets
from proteingpt.data.shard_cache import CHUNK_BYTES, Activity, ShardCache, megabytes
from proteingpt.data.shard_format import ShardError

TRIES, FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5, 0.5, 10.0
HTTP_TIMEOUT_SECONDS = 30.0  # without a byte
DAMAGED = "damaged"  # kind of a Failure: fetched once more, in case it was damaged on its way
# What could not be had is not asked for again for so long: a missing shard has many samples.
FORGET_FAILURE_SECONDS = 60.0
NOT_THERE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Here:
    """A local directory. With a cache, a shard is compared with its sha256 when it is first opened, and the cache
    remembers it, so that a run that goes on need not read it whole again."""

    def __init__(self, directory: Path, cache: ShardCache | None):
        self.directory = self.address = directory
        self.cache = cache

    def read(self, name: str, max_bytes: int) -> bytes:
        """A whole small file. FileNotFoundError where there is none."""
        size = (self.directory / name).stat().st_size
        if size > max_bytes:
            raise ShardError(f"{self.directory / name}: {size} bytes, wanted at most {max_bytes}")
        return (self.directory / name).read_bytes()

    def check(self, shard: dict):
        """Whether it is there, in its right size."""
        path = self.directory / shard["file"]
        try:
            size = path.stat().st_size
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise ShardError(f"shard {path} cannot be read: {error.strerror}") from error
            raise ShardError(f"shard {path} is missing, the manifest lists it: copy it again, or build anew") from error
        if size != shard["num_bytes"]:
            raise ShardError(
                f"shard {path} has {size} bytes, the manifest says {shard['num_bytes']}: copy it again, or build anew"
            )

    def path(self, shard: dict, activity: Activity) -> Path:
        """The file to open."""
        path = self.directory / shard["file"]
        activity.text = f"shard {path}, opening it"
        if self.cache is not None:
            self.cache.verify(path, shard["sha256"], activity)
        return path

    def expect(self, shards: list[dict]):
        """The shards that will be read soon. All are here."""

    def forget(self, shard: dict):
        """Another copy is wanted of a shard that is damaged. There is none."""

    def close(self):
        pass


class There:
    """An address: s3://BUCKET/DIR, http://HOST/DIR, memory://DIR, file:///DIR, ..."""

    def __init__(self, address: str, cache: ShardCache):
        self.address, self.cache = shown(address), cache
        self._full_address = address
        self.directory = cache.directory
        self._expected: list[dict] = []
        self._failed: dict[str, tuple[float, ShardError]] = {}
        self._forgotten: set[str] = set()
        self._changed, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def read(self, name: str, max_bytes: int) -> bytes:
        parts = []

        def fetch():
            parts[:] = chunks(join(self._full_address, name), max_bytes)

        with_retries(fetch, f"{self.address}/{name}", Activity(), self._stopped)
        return b"".join(parts)

    def check(self, shard: dict):
        """Known when it is fetched."""

    def path(self, shard: dict, activity: Activity) -> Path:
        failed = self._failed.get(shard["sha256"])
        if failed and time.monotonic() - failed[0] < FORGET_FAILURE_SECONDS:
            raise failed[1]
        try:
            return self._fetched(shard, activity, needed=True)
        except ShardError as error:
            self._failed[shard["sha256"]] = (time.monotonic(), error)
            raise

    def expect(self, shards: list[dict]):
        """Fetched in this order, in the background, as far as the cache holds them all."""
        if shards == self._expected:
            return
        self._expected = list(shards)
        self._changed.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_ahead, name="fetch-ahead", daemon=True)
            self._thread.start()

    def forget(self, shard: dict):
        """Once, so that a sample that is damaged at the source does not bring its shard anew each time."""
        if shard["sha256"] not in self._forgotten:
            self._forgotten.add(shard["sha256"])
            self.cache.remove(shard["sha256"])

    def close(self):
        self._stopped.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)  # a stalled transfer ends with the process

    def _fetched(self, shard: dict, activity: Activity, needed: bool) -> Path | None:
        url = join(self._full_address, shard["file"])
        name = f"{self.address}/{shard['file']}"
        keep = [expected["sha256"] for expected in self._expected]

        def fetch(partial: Path):
            def download():
                write_verified(chunks(url, shard["num_bytes"]), partial, shard, name, activity)

            with_retries(download, name, activity, self._stopped)

        return self.cache.get(shard, name, fetch, keep, activity, needed, self._stopped)

    def _fetch_ahead(self):
        while not self._stopped.is_set():
            self._changed.wait()
            self._changed.clear()
            for shard in (expected := self._expected):
                if self._stopped.is_set() or expected is not self._expected:
                    break
                try:
                    self._fetched(shard, Activity(), needed=False)
                except (ShardError, OSError):
                    continue  # said where it is needed


# ------------------------------------------------------------------------------------------------------- transfers


def is_remote(address: str | Path) -> bool:
    return "://" in str(address)


def join(address: str, name: str) -> str:
    """Before a query, which signed addresses have."""
    base, mark, query = address.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def shown(address: str) -> str:
    """Without what may be a secret: user, password, signature."""
    return without_secrets(address).rstrip("/")


def chunks(url: str, max_bytes: int) -> Iterator[bytes]:
    """The content, piece by piece. Raises web.Failure."""
    if url.startswith(("http://", "https://")):
        response = web.send(url, None, {}, HTTP_TIMEOUT_SECONDS)
        with response:
            if response.status != 200:
                reason = f"HTTP status {response.status} ({response.reason})"
                raise web.Failure(reason, web.is_passing(response.status), response.status)
            yield from web.read_chunks(response, max_bytes, float("inf"))
        return
    import fsspec

    received = 0
    try:
        with fsspec.open(url, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                received += len(chunk)
                if received > max_bytes:
                    raise web.Failure(f"more than the {max_bytes} bytes allowed", passing=False)
                yield chunk
    except web.Failure:
        raise
    except ImportError as error:
        raise ShardError(f"{shown(url)}: {error}") from error  # fsspec names the package to install
    except Exception as error:  # each file system has errors of its own
        passing = not isinstance(error, (*NOT_THERE, ValueError))
        raise web.Failure(f"{type(error).__name__}: {error}", passing) from error


def write_verified(content: Iterator[bytes], partial: Path, shard: dict, name: str, activity: Activity):
    """Into the partial file. web.Failure where it is not what the manifest says."""
    found, num_bytes = hashlib.sha256(), 0
    with open(partial, "r+b") as file:
        for chunk in content:
            file.write(chunk)
            found.update(chunk)
            num_bytes += len(chunk)
            activity.text = f"shard {name}, fetching it: {megabytes(num_bytes)} of {megabytes(shard['num_bytes'])} MB"
        file.flush()
        os.fsync(file.fileno())
    if num_bytes != shard["num_bytes"]:
        raise web.Failure(f"{num_bytes} bytes came, the manifest says {shard['num_bytes']}")
    if found.hexdigest() != shard["sha256"]:
        raise web.Failure("its sha256 is not the manifest's", kind=DAMAGED)


def with_retries(fetch: Callable[[], None], name: str, activity: Activity, stopped: threading.Event):
    """Tries again with growing pauses what may do better. Raises ShardError: what could not be had, and why."""
    for tried in range(1, TRIES + 1):
        activity.text = f"{name}, fetching it, try {tried} of {TRIES}"
        try:
            return fetch()
        except web.Failure as failure:
            reason = failure.reason
            if not failure.passing or tried == (2 if failure.kind == DAMAGED else TRIES):
                tries = f"{tried} {'try' if tried == 1 else 'tries'}"
                raise ShardError(
                    f"{name} could not be fetched ({tries}): {reason}: is the address right, is the server up?"
                ) from failure
            pause = web.backoff(FIRST_WAIT_SECONDS, tried, LONGEST_WAIT_SECONDS)
        activity.text = f"{name}, waiting to fetch it again after {reason}, try {tried} of {TRIES}"
        if stopped.wait(pause):
            raise ShardError(f"{name}: not fetched, since reading has ended")
