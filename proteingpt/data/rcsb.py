"""RCSB's archive and AlphaFold DB over HTTP, behind a cache on disk: structures, facts, abstracts, sequence clusters.

What is cached is never asked for again; a 404 is remembered with its reason. Chosen: the Data API's own JSON as the
form of the cache, so that a mirror of it needs no network and a better reading of it no download.
"""

import contextlib
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from proteingpt.data.annotations import (
    ENTRY_QUERY,
    Annotation,
    AnnotationError,
    annotation_from_rcsb,
    entry_id,
    place,
    read_annotation,
    removal_from_rcsb,
)
from proteingpt.data.fetching import Fetcher, FetchError, NotFound, in_parallel
from proteingpt.data.rcsb_answers import (
    receive_entries,
    receive_ids,
    receive_json,
    search_for_entries,
    text_like,
    whole_gzip,
)
from proteingpt.data.structure.fact_texts import DAY

# The sequence identities, in percent, for which RCSB publishes a file of clusters.
CLUSTER_IDENTITIES = (30, 40, 50, 70, 90, 95, 100)

# So many downloads failing one after the other mean that the server is down, not that a file is bad.
MAX_FAILURES_IN_A_ROW = 20

_GONE_STATUS = {404, 410}

# UniProt's own pattern of an accession.
_ACCESSION = re.compile(r"[OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9](?:[A-Z][A-Z0-9]{2}[0-9]){1,2}")


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


class Client:
    """Fetches into a cache. Safe to use from several threads, and by several processes on one cache.

    cache/structures/ab/1abc.bcif.gz    as fetched
    cache/annotations/ab/1abc.json      one entry of the Data API's answer; `read_annotations` reads this
    cache/alphafold/37/AF-P29373-F1-model_v6.cif, cache/clusters/*.txt, cache/entry_ids*.json
    cache/missing/KIND/ab/1abc.json     what the servers said they have not, and why

    batch_size: entries asked about at once. limits: settings of fetching.Fetcher.
    """

    def __init__(self, cache: str | Path, addresses: Addresses = Addresses(), *, batch_size: int = 200, **limits):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, wanted more than 0")
        self.cache, self.addresses = Path(cache), addresses
        self._fetcher = Fetcher(self.cache, **limits)
        self._batch_size = batch_size
        self._failed: dict[str, str] = {}

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
            found = self._fetcher.request(url, receive_ids, _json_bytes(search_for_entries(released_until)))
            if not found:
                return []  # nothing worth keeping
            self._fetcher.write(path, _json_bytes(sorted(map(entry_id, found))))
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
            self._fetcher.download(url, path, whole_gzip)
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
        for name, future in in_parallel(self.fetch_structure, dict.fromkeys(map(entry_id, ids)), num_threads):
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
        for batch, future in in_parallel(self._fetch_batch, batches, num_threads):
            annotations |= future.result()
            for name in batch if progress is not None else ():
                progress(name, name in annotations)
        return {name: annotations[name] for name in wanted if name in annotations}

    def fetch_clusters(self, identity: int = 30) -> Path:
        """The path of the file of clusters at that percentage of sequence identity. Raises FetchError.

        RCSB renews the file every week; the cache keeps the first one, and deleting it fetches anew.
        """
        if identity not in CLUSTER_IDENTITIES:
            raise ValueError(f"identity is {identity}, RCSB has clusters at {', '.join(map(str, CLUSTER_IDENTITIES))}")
        path = self.cache / "clusters" / f"clusters-by-entity-{identity}.txt"
        if not path.is_file():
            check = functools.partial(text_like, rb"\w+_\d+[ \r\n]")
            self._fetcher.download(f"{self.addresses.clusters}/{path.name}", path, check)
        return path

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
            version = _latest_version(url, self._fetcher.request(url, receive_json), name)
            path = folder / f"AF-{name}-F1-model_v{version}.cif"
            check = functools.partial(text_like, rb"(#[^\n]*\n|\s)*data_")
            self._fetcher.download(f"{self.addresses.alphafold}/files/{path.name}", path, check)
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
            entries = self._fetcher.request(url, receive_entries, body, patient=len(names) == 1)
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
            self._fetcher.write(place(self.cache / "annotations", name, ".json"), _json_bytes(by_name[name]))
        return annotations

    # What is not there

    def _why_missing(self, name: str, reason: str) -> str:
        """RCSB knows the entries it removed; whatever else happens, the reason stays the one we have."""
        try:
            url = f"{self.addresses.data}/rest/v1/holdings/removed/{name.upper()}"
            return removal_from_rcsb(self._fetcher.request(url, receive_json))
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
        self._fetcher.write(place(self.cache / "missing" / kind, name, ".json"), _json_bytes(record))
        return NotFound(error.url, error.tries, reason, error.status)

def _json_bytes(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _latest_version(url: str, predictions, accession: str) -> int:
    """Of the model of the accession itself: the list may hold isoforms (P29373-2) too."""
    for prediction in predictions if isinstance(predictions, list) else ():
        if isinstance(prediction, dict) and prediction.get("uniprotAccession") == accession:
            if isinstance(prediction.get("latestVersion"), int):
                return prediction["latestVersion"]
    raise FetchError(url, 1, "AlphaFold DB's answer has no model of this very accession", status=404)
