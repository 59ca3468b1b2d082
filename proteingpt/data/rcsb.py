"""RCSB's archive and AlphaFold DB over HTTP, behind a cache on disk: structures, facts, abstracts, sequence clusters.

What is cached is never asked for again; a file is checked, written aside and renamed, so a kill at any point leaves
whole files only. Passing failures are tried again with growing waits; a 404 is remembered with its reason.
Chosen: the standard library, and the Data API's own JSON as the form of the cache, so that a mirror of it needs no
network and a better reading of it no download. Given up: connections kept alive, and going on in the middle of a file.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from proteingpt.data.annotations import (
    ENTRY_QUERY,
    Annotation,
    AnnotationError,
    annotation_from_rcsb,
    entry_id,
    parse_clusters,
    place,
    read_annotation,
    removal_from_rcsb,
)
from proteingpt.data.rcsb_answers import (
    receive_entries,
    receive_ids,
    receive_json,
    refusal,
    search_for_entries,
    text_like,
    whole_gzip,
)
from proteingpt.data.structure.fact_texts import DAY
from proteingpt.web import Failure, backoff, read_chunks, send

USER_AGENT = "proteingpt (ProteinGPT data set builder; python-urllib)"

# The sequence identities, in percent, for which RCSB publishes a file of clusters.
CLUSTER_IDENTITIES = (30, 40, 50, 70, 90, 95, 100)

MAX_BACKOFF_SECONDS = 60.0

# So many downloads failing one after the other mean that the server is down, not that a file is bad.
MAX_FAILURES_IN_A_ROW = 20

_GONE_STATUS = {404, 410}

# UniProt's own pattern of an accession.
_ACCESSION = re.compile(r"[OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9](?:[A-Z][A-Z0-9]{2}[0-9]){1,2}")


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


@dataclass(frozen=True)
class Addresses:
    """Where everything comes from; the defaults are the public services. http or https, without a slash at the end.

    files: `{files}/1abc.bcif.gz`. data: `{data}/graphql`, `{data}/rest/v1/...`.
    search: `{search}/rcsbsearch/v2/query`. clusters: `{clusters}/clusters-by-entity-30.txt`.
    alphafold: `{alphafold}/api/prediction/P29373`, `{alphafold}/files/AF-P29373-F1-model_v6.cif`.
    """

    files: str = "https://models.rcsb.org"
    data: str = "https://data.rcsb.org"
    search: str = "https://search.rcsb.org"
    clusters: str = "https://cdn.rcsb.org/resources/sequence/clusters"
    alphafold: str = "https://alphafold.ebi.ac.uk"

    def __post_init__(self):
        for name, address in vars(self).items():
            if not re.match(r"https?://[^/]", address):
                raise ValueError(f"address of {name} is {address!r}, wanted one that begins with http:// or https://")
            object.__setattr__(self, name, address.rstrip("/"))


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


# ------------------------------------------------------------------------------------------------------ the client


class Client:
    """Fetches into a cache. Safe to use from several threads, and by several processes on one cache.

    cache/structures/ab/1abc.bcif.gz    as fetched
    cache/annotations/ab/1abc.json      one entry of the Data API's answer; `read_annotations` reads this
    cache/alphafold/37/AF-P29373-F1-model_v6.cif, cache/clusters/*.txt, cache/entry_ids*.json
    cache/missing/KIND/ab/1abc.json     what the servers said they have not, and why
    cache/partial/                      what is being written

    retries: tries after the first one. timeout: seconds without a byte. total_seconds: for one file or question, over
    all its tries and waits. backoff_seconds: the first wait, doubled each time, times 0.5 to 1 drawn by `seed`.
    batch_size: entries asked about at once. sleep: called with the seconds of every wait.
    """

    def __init__(
        self,
        cache: str | Path,
        addresses: Addresses = Addresses(),
        *,
        requests_per_second: float = 10.0,
        retries: int = 6,
        timeout: float = 60.0,
        total_seconds: float = 1800.0,
        backoff_seconds: float = 1.0,
        batch_size: int = 200,
        max_bytes: int = 1 << 30,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        limits = dict(requests_per_second=requests_per_second, timeout=timeout, total_seconds=total_seconds)
        for name, value in dict(limits, batch_size=batch_size, max_bytes=max_bytes).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}, wanted more than 0")
        if retries < 0 or backoff_seconds < 0:
            raise ValueError(f"retries is {retries}, backoff_seconds {backoff_seconds}; wanted 0 or more")
        self.cache, self.addresses = Path(cache), addresses
        self.retries, self.timeout, self.total_seconds = retries, timeout, total_seconds
        self.backoff_seconds, self.max_bytes, self.seed = backoff_seconds, max_bytes, seed
        self._batch_size = batch_size
        self._sleep = sleep
        self._limit = RateLimit(requests_per_second, sleep=sleep)
        self._failed: dict[str, str] = {}
        self._remove_stale_partials()

    # What can be fetched

    def all_ids(self, released_until: str | None = None) -> list[str]:
        """Ids of all experimental entries, sorted; of those first released until a day such as 2023-05-17.

        Asked once and kept, so that a build that is started again has the same entries: delete the file
        `entry_ids*.json` in the cache for a newer list. Raises FetchError.
        """
        if released_until is not None and not DAY.fullmatch(released_until):
            raise ValueError(f"released_until is {released_until!r}, wanted a day such as 2023-05-17")
        path = self.cache / (f"entry_ids-{released_until}.json" if released_until else "entry_ids.json")
        if not path.is_file():
            url = f"{self.addresses.search}/rcsbsearch/v2/query"
            found = self._request(url, receive_ids, _json_bytes(search_for_entries(released_until)))
            if not found:
                return []  # nothing worth keeping
            self._write(path, _json_bytes(sorted(map(entry_id, found))))
        return json.loads(path.read_bytes())

    def fetch_structure(self, pdb_id: str) -> Path:
        """The path of the entry's BinaryCIF file, gzipped. Raises NotFound with the reason, or FetchError."""
        name = entry_id(pdb_id)
        path = place(self.cache / "structures", name, ".bcif.gz")
        if path.is_file():
            return path
        url = f"{self.addresses.files}/{name}.bcif.gz"
        self._refuse_known_missing("structures", name, url)
        try:
            self._download(url, path, whole_gzip)
        except FetchError as error:
            if error.status not in _GONE_STATUS:
                raise
            raise self._missing_now("structures", name, error, self._why_missing(name, error.reason)) from None
        return path

    def without_structure(self, ids: Iterable[str]) -> list[str]:
        """Those whose structure is not in the cache."""
        return [name for name in ids if not place(self.cache / "structures", entry_id(name), ".bcif.gz").is_file()]

    def without_annotation(self, ids: Iterable[str]) -> list[str]:
        """Those whose annotation is not in the cache, nor known to be missing."""
        known = self.missing("annotations")
        folder = self.cache / "annotations"
        return [name for name in ids if name not in known and not place(folder, entry_id(name), ".json").is_file()]

    def prefetch(
        self, ids: Iterable[str], num_threads: int = 8, progress: Callable[[str, bool], None] | None = None
    ) -> dict[str, str]:
        """Fetches structures, so many at once. Returns {id: reason} of those that could not be had.

        progress: called with each id when it is done, and whether it came.
        Raises FetchError when many in a row failed otherwise than by
        not being there: then the server is in trouble, and another start goes on from here.
        """
        reasons, in_a_row = {}, 0
        for name, future in _in_parallel(self.fetch_structure, dict.fromkeys(map(entry_id, ids)), num_threads):
            try:
                future.result()
                in_a_row = 0
            except NotFound as error:
                reasons[name], in_a_row = error.reason, 0
            except FetchError as error:
                reasons[name], in_a_row = str(error), in_a_row + 1
                if in_a_row >= MAX_FAILURES_IN_A_ROW:
                    raise
            if progress is not None:
                progress(name, name not in reasons)
        return reasons

    def fetch_annotations(
        self, ids: Iterable[str], num_threads: int = 2, progress: Callable[[str, bool], None] | None = None
    ) -> dict[str, Annotation]:
        """{id: annotation}; an id that is not in it stands with its reason in `missing("annotations")`.

        Asks for many entries at once, for fewer where that is too much for the server. progress: called with each id
        that had to be asked about, and whether it came. Raises FetchError; what came before is in the cache.
        """
        wanted = dict.fromkeys(map(entry_id, ids))
        annotations = {name: found for name in wanted if (found := self._cached_annotation(name)) is not None}
        todo = [n for n in wanted if n not in annotations and self._known_reason("annotations", n) is None]
        batches = [tuple(todo[i : i + self._batch_size]) for i in range(0, len(todo), self._batch_size)]
        for batch, future in _in_parallel(self._fetch_batch, batches, num_threads):
            annotations |= future.result()
            for name in batch if progress is not None else ():
                progress(name, name in annotations)
        return {name: annotations[name] for name in wanted if name in annotations}

    def fetch_clusters(self, identity: int = 30) -> dict[str, int]:
        """{`1ABC_1`: number of its cluster} at that percentage of sequence identity. Raises FetchError.

        RCSB renews the file every week; the cache keeps the first one, and deleting it fetches anew.
        """
        if identity not in CLUSTER_IDENTITIES:
            raise ValueError(f"identity is {identity}, RCSB has clusters at {', '.join(map(str, CLUSTER_IDENTITIES))}")
        path = self.cache / "clusters" / f"clusters-by-entity-{identity}.txt"
        if not path.is_file():
            check = functools.partial(text_like, rb"\w+_\d+[ \r\n]")
            self._download(f"{self.addresses.clusters}/{path.name}", path, check)
        with open(path, encoding="ascii") as lines:
            return parse_clusters(lines)

    def fetch_alphafold(self, accession: str) -> Path:
        """The path of AlphaFold DB's newest mmCIF model of a UniProt accession. Raises NotFound or FetchError."""
        name = accession.strip().upper()
        if not _ACCESSION.fullmatch(name):
            raise ValueError(f"{accession!r} is not a UniProt accession; wanted one such as P29373 or A0A140LG11")
        folder = place(self.cache / "alphafold", name, "").parent
        cached = sorted(folder.glob(f"AF-{name}-F1-model_v*.cif"))
        if cached:
            return cached[-1]
        url = f"{self.addresses.alphafold}/api/prediction/{name}"
        self._refuse_known_missing("alphafold", name, url)
        try:
            version = _latest_version(url, self._request(url, receive_json), name)
            path = folder / f"AF-{name}-F1-model_v{version}.cif"
            check = functools.partial(text_like, rb"(#[^\n]*\n|\s)*data_")
            self._download(f"{self.addresses.alphafold}/files/{path.name}", path, check)
        except FetchError as error:
            if error.status not in _GONE_STATUS:
                raise
            raise self._missing_now("alphafold", name, error, "AlphaFold DB has no model of it") from None
        return path

    def missing(self, kind: str) -> dict[str, str]:
        """{id: reason} of what the servers do not have. kind: `structures`, `annotations` or `alphafold`.

        With `annotations` come the entries that only this client failed on: they are asked about again next time.
        """
        known = {}
        for path in sorted((self.cache / "missing" / kind).rglob("*.json")):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                known[path.stem] = json.loads(path.read_bytes())["reason"]
        return known | (self._failed if kind == "annotations" else {})

    def forget_missing(self) -> None:
        """For a new build on an old cache: asks again for what was not there."""
        shutil.rmtree(self.cache / "missing", ignore_errors=True)
        self._failed.clear()

    # Annotations

    def _cached_annotation(self, name: str) -> Annotation | None:
        path = place(self.cache / "annotations", name, ".json")
        try:
            return read_annotation(path)[1]
        except (FileNotFoundError, ValueError):
            return None  # a damaged one is fetched again

    def _fetch_batch(self, names: tuple[str, ...]) -> dict[str, Annotation]:
        if len(names) > self._batch_size:
            return self._fetch_halves(names)
        url = f"{self.addresses.data}/graphql"
        body = _json_bytes({"query": ENTRY_QUERY, "variables": {"ids": [name.upper() for name in names]}})
        try:
            entries = self._request(url, receive_entries, body, patient=len(names) == 1)
        except FetchError as error:
            if error.kind and len(names) > 1:
                if error.kind != "errors":
                    self._batch_size = min(self._batch_size, len(names) // 2)
                return self._fetch_halves(names)
            if error.kind not in ("errors", "too large"):
                raise
            self._failed[names[0]] = str(error)
            return {}
        return self._keep_entries(names, entries or [])

    def _fetch_halves(self, names: tuple[str, ...]) -> dict[str, Annotation]:
        middle = len(names) // 2
        return self._fetch_batch(names[:middle]) | self._fetch_batch(names[middle:])

    def _keep_entries(self, names: tuple[str, ...], entries: list[dict]) -> dict[str, Annotation]:
        """Caches those entries that were asked for; the others that were asked for are not there."""
        by_name = {entry_id(entry["rcsb_id"]): entry for entry in entries if isinstance(entry.get("rcsb_id"), str)}
        annotations = {}
        for name in names:
            if name not in by_name:
                error = FetchError(f"{self.addresses.data}/graphql", 1, "not among the entries of the answer")
                self._missing_now("annotations", name, error, self._why_missing(name, error.reason))
                continue
            try:
                annotations[name] = annotation_from_rcsb(by_name[name])
            except AnnotationError as error:
                self._failed[name] = str(error)
                continue
            self._write(place(self.cache / "annotations", name, ".json"), _json_bytes(by_name[name]))
        return annotations

    # What is not there

    def _why_missing(self, name: str, reason: str) -> str:
        """RCSB knows the entries it removed; whatever else happens, the reason stays the one we have."""
        try:
            url = f"{self.addresses.data}/rest/v1/holdings/removed/{name.upper()}"
            return removal_from_rcsb(self._request(url, receive_json))
        except (FetchError, AnnotationError):
            return f"RCSB has no such entry: {reason}"

    def _known_reason(self, kind: str, name: str) -> str | None:
        try:
            return str(json.loads(place(self.cache / "missing" / kind, name, ".json").read_bytes())["reason"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _refuse_known_missing(self, kind: str, name: str, url: str) -> None:
        reason = self._known_reason(kind, name)
        if reason is not None:
            raise NotFound(url, 0, reason, status=404)

    def _missing_now(self, kind: str, name: str, error: FetchError, reason: str) -> NotFound:
        record = {"id": name, "url": error.url, "reason": reason}
        self._write(place(self.cache / "missing" / kind, name, ".json"), _json_bytes(record))
        return NotFound(error.url, error.tries, reason, error.status)

    # Requests

    def _request(self, url: str, receive: Callable, body: bytes | None = None, patient: bool = True):
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

    def _download(self, url: str, path: Path, check: Callable[[Iterable[bytes]], Iterator[bytes]]) -> None:
        self._request(url, lambda chunks: self._save(path, check(chunks)))

    # Files

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

    def _write(self, path: Path, content: bytes) -> None:
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


def _json_bytes(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _latest_version(url: str, predictions, accession: str) -> int:
    """Of the model of the accession itself: the list may hold isoforms (P29373-2) too."""
    for prediction in predictions if isinstance(predictions, list) else ():
        if isinstance(prediction, dict) and prediction.get("uniprotAccession") == accession:
            if isinstance(prediction.get("latestVersion"), int):
                return prediction["latestVersion"]
    raise FetchError(url, 1, "AlphaFold DB's answer has no model of this very accession", status=404)


def _in_parallel(function: Callable, items: Iterable, num_threads: int) -> Iterator[tuple[object, Future]]:
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
