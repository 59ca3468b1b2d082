"""Fetching over HTTP into a cache on disk: at a rate, tried again with growing waits, and whole files only.

A file is checked while it comes, written aside, flushed to disk and renamed, so that a kill at any point leaves nothing
half done. Chosen: the standard library. Given up: connections kept alive, and going on in the middle of a file.
"""

import itertools
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from proteingpt.data.rcsb_answers import refusal
from proteingpt.web import Failure, backoff, read_chunks, send

USER_AGENT = "proteingpt (ProteinGPT data set builder; python-urllib)"

MAX_BACKOFF_SECONDS = 60.0


class FetchError(ValueError):
    """Something could not be fetched: names the address, how often it was tried and the last reason.

    status: the HTTP status of the last try, None where there was no answer. kind: `too large`, `timeout` or `errors`
    (GraphQL) where asking for less at once may help, else an empty string.
    """

    def __init__(self, url: str, tries: int, reason: str, status: int | None = None, kind: str = ""):
        num_tries = "1 try" if tries == 1 else f"{tries} tries"
        super().__init__(f"{url}: {reason} ({num_tries}); what was fetched before is kept, so start again to go on")
        self.url, self.tries, self.reason, self.status, self.kind = url, tries, reason, status, kind


class NotFound(FetchError):
    """The server has no such thing. Remembered in the cache, so tries is 0 when it was known before."""


class RateLimit:
    """At most so many starts per second, over all threads: each takes the next free moment and sleeps until then."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic, sleep=time.sleep):
        self._interval, self._clock, self._sleep = 1.0 / per_second, clock, sleep
        self._next = clock()
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._interval
        if start > now:
            self._sleep(start - now)

    def hold(self, seconds: float) -> None:
        """Nobody starts within so many seconds."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


class Fetcher:
    """Requests and files. Safe to use from several threads, and by several processes on one cache.

    cache/partial/ holds what is being written. retries: tries after the first one. timeout: seconds without a byte.
    total_seconds: for one file or question, over all its tries and waits. backoff_seconds: the first wait, doubled each
    time, times 0.5 to 1 drawn by `seed`. sleep: called with the seconds of every wait.
    """

    def __init__(
        self,
        cache: Path,
        *,
        requests_per_second: float = 10.0,
        retries: int = 6,
        timeout: float = 60.0,
        total_seconds: float = 1800.0,
        backoff_seconds: float = 1.0,
        max_bytes: int = 1 << 30,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        limits = dict(requests_per_second=requests_per_second, timeout=timeout, total_seconds=total_seconds)
        for name, value in dict(limits, max_bytes=max_bytes).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}, wanted more than 0")
        if retries < 0 or backoff_seconds < 0:
            raise ValueError(f"retries is {retries}, backoff_seconds {backoff_seconds}; wanted 0 or more")
        self.cache, self.retries, self.timeout, self.total_seconds = cache, retries, timeout, total_seconds
        self.backoff_seconds, self.max_bytes, self.seed = backoff_seconds, max_bytes, seed
        self._sleep = sleep
        self._limit = RateLimit(requests_per_second, sleep=sleep)
        self._remove_stale_partials()

    def request(self, url: str, receive: Callable, body: bytes | None = None, patient: bool = True):
        """What `receive` makes of the body's chunks; None for an answer without content. Raises FetchError.

        patient: False gives up at once where asking for less may help.
        """
        self._limit.wait()
        deadline = time.monotonic() + self.total_seconds
        for tries in itertools.count(1):
            try:
                return self._try(url, receive, body, deadline)
            except Failure as failure:
                last, reason = failure, failure.reason
            pause = max(last.retry_after, self._backoff(url, tries))
            if not last.passing or tries > self.retries or (not patient and last.kind in ("timeout", "too large")):
                break
            if time.monotonic() + pause > deadline:
                reason += f", and the next try in {pause:.0f} s would exceed the {self.total_seconds:.0f} s in all"
                break
            # What the server asked for holds for every thread; our own wait for this file only.
            (self._limit.hold if last.retry_after else self._sleep)(pause)
            self._limit.wait()
        raise FetchError(url, tries, reason, last.status, last.kind) from last

    def _backoff(self, url: str, tries: int) -> float:
        return backoff(self.backoff_seconds, tries, MAX_BACKOFF_SECONDS, (self.seed, zlib.crc32(url.encode())))

    def _try(self, url: str, receive: Callable, body: bytes | None, deadline: float):
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        with send(url, body, headers, self.timeout) as response:
            if not 200 <= response.status < 300:
                raise refusal(response)
            return None if response.status == 204 else receive(read_chunks(response, self.max_bytes, deadline))

    def download(self, url: str, path: Path, check: Callable[[Iterable[bytes]], Iterator[bytes]]) -> None:
        self.request(url, lambda chunks: self._save(path, check(chunks)))

    def _save(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Writes aside, and gives the file its name when all chunks have come and been found good."""
        partial = self._partial_folder / f"{self._partial_prefix}{os.getpid()}-{threading.get_ident()}-{path.name}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def write(self, path: Path, content: bytes) -> None:
        self._save(path, [content])

    @property
    def _partial_folder(self) -> Path:
        return self.cache / "partial"

    @property
    def _partial_prefix(self) -> str:
        return f"{socket.gethostname()}-"

    def _remove_stale_partials(self) -> None:
        """Those of killed processes of this machine; others may be writing here, on this one and elsewhere."""
        for path in self._partial_folder.glob("*"):
            pid = path.name.removeprefix(self._partial_prefix).split("-")[0]
            if path.name.startswith(self._partial_prefix) and pid.isdecimal() and not _is_alive(int(pid)):
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def in_parallel(function: Callable, items: Iterable, num_threads: int) -> Iterator[tuple[object, Future]]:
    """(item, its finished future) as they finish, with a few items ahead of the threads, never all of them."""
    items = iter(items)
    running: dict[Future, object] = {}
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        try:
            while True:
                for item in itertools.islice(items, max(0, 2 * num_threads - len(running))):
                    running[pool.submit(function, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future
        finally:
            for future in running:
                future.cancel()
