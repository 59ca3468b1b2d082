"""Reading shards: each sample by one positioned read at the offset that the index gives, its checksums compared.

A tar reader that walks the headers would drop or alter samples silently where a header or a byte is damaged. One
prefetch thread reads far faster than a GPU trains (benchmarks/loader.py), and processes would pay for passing tensors.
Keys and places of samples are mapped columns, so that a set of any size takes the memory of what is in use.
"""

import hashlib
import os
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from proteingpt.data.columns import Texts, Writer, made_once
from proteingpt.data.manifest import (
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_SAMPLE_BYTES,
    Index,
    parse_index,
    parse_manifest,
    shards_fingerprint,
)
from proteingpt.data.shard_cache import Activity, ShardCache
from proteingpt.data.shard_format import (
    FIELDS,
    FILE_NAMES,
    MANIFEST_NAME,
    PROTEIN_FIELDS,
    SHARD_FILE,
    TEXT_FIELDS,
    ShardError,
    decode_meta,
    decode_protein,
    decode_sample,
    decode_turns,
    file_sha256,
)
from proteingpt.data.shard_places import Here, There, is_remote
from proteingpt.protein import Protein, Sample, Turn

# Files open at a time; of more shards the one used longest ago is closed.
MAX_OPEN_SHARDS = 128
# Samples from which on the columns are kept beside the shards. Fewer are read from the indexes each time: 20 us each.
KEPT_FROM = 2**17
COLUMNS = {"keys": "u1", "key_starts": "<i8", "num_residues": "<i4", "num_turns": "<i4", "spans": "<i8"}


class BadSample(ShardError):
    """One sample that cannot be read. shard: its file or address; key, reason: for the report of what is set aside."""

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(f"shard {shard}, sample {key}, {reason}")
        self.shard, self.key, self.reason = shard, key, reason


class NoSplit(ShardError):
    """The shards have no such split."""


class ShardSet:
    """The samples of one split, by number, in the order of the shards. Safe to read from several threads.

    keys: S sample keys. num_residues, num_turns: int32 (S,). shard_starts: int64 (H + 1,), the first sample of each of
    the H shards. manifest: the whole manifest. fingerprint: sha256 over the checksums of the split's shards; two sets
    with the same one hold the same samples. directory: where files may lie beside the shards; of a remote set, its
    cache. activity: what is being read. location: a directory, or an address that fsspec knows; of a remote one shards
    come through `cache`. With a cache, local shards are compared with their sha256 when they are first opened, once for
    all runs. Opening reads the manifest and the indexes, of large sets once and then never again, and compares the
    sizes of local shards; `verify` compares every byte. Raises ShardError that names what is missing or broken.
    """

    def __init__(self, location: str | Path, split: str, cache: ShardCache | None = None):
        self.split = split
        self.place = There(str(location), cache or ShardCache()) if is_remote(location) else Here(Path(location), cache)
        self.directory, self.address = self.place.directory, self.place.address
        self.manifest = read_manifest(location) if isinstance(self.place, Here) else _fetch_manifest(self.place)
        if split not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"]) or "none"
            raise NoSplit(f"no split {split!r} in {self.address}: there are {known}")
        self.shards: list[dict] = self.manifest["splits"][split]
        self.fingerprint = shards_fingerprint(self.shards)
        for shard in self.shards:
            self.place.check(shard)
        sizes = [shard["num_samples"] for shard in self.shards]
        self.shard_starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        self._starts = self.shard_starts.tolist()  # in which bisect looks faster
        kept = Path(self.directory) / index_name(split, self.shards) if sum(sizes) >= KEPT_FROM else None
        columns = made_once(kept, COLUMNS, self._write_columns)
        self.keys = Texts(columns["keys"], columns["key_starts"])
        self.num_residues, self.num_turns = columns["num_residues"], columns["num_turns"]
        lengths = {len(self.keys), len(self.num_residues), len(self.num_turns), len(columns["spans"]) / len(FIELDS) / 3}
        if lengths != {sum(sizes)}:
            raise ShardError(f"{kept}: not the columns of {sum(sizes)} samples: remove this folder, it is made anew")
        # int64 (S, fields, 3): offset, size, crc32; offset -1 where a sample lacks the field.
        self._spans = columns["spans"].reshape(-1, len(FIELDS), 3)
        self.activity = Activity()
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def is_remote(self) -> bool:
        return isinstance(self.place, There)

    @property
    def shard_numbers(self) -> np.ndarray:
        """int64 (S,): the shard of each sample, made anew at each call."""
        return np.repeat(np.arange(len(self.shards)), np.diff(self.shard_starts))

    def shard_of(self, i: int) -> int:
        return bisect_right(self._starts, i) - 1

    def read(self, i: int) -> Sample:
        """Sample i, by one positioned read. Arrays are float32, owned by the caller and writable.

        Raises BadSample naming shard, key and field where it is damaged, gone, or not as long as the index says;
        IndexError where there is no sample i.
        """
        return self._checked(i, FIELDS, lambda members: self._of_right_length(i, decode_sample(members)))

    def read_protein(self, i: int) -> Protein:
        """The protein of sample i, without its questions, which training has as token ids. Raises as `read` does."""
        return self._checked(i, PROTEIN_FIELDS, lambda members: self._of_right_length(i, decode_protein(members)))

    def read_text(self, i: int) -> tuple[str, tuple[Turn, ...]]:
        """Description and turns of sample i, without reading its coordinates. Raises as `read` does."""
        return self._checked(
            i, TEXT_FIELDS, lambda members: (decode_meta(members)["description"], decode_turns(members))
        )

    def expect(self, shards: list[int]):
        """Tells which shards will be read next, by number: those of a remote set are fetched in this order, ahead."""
        self.place.expect([self.shards[number] for number in shards])

    def verify(self) -> None:
        """Compares every shard and index of a local split with its sha256. One ShardError names all that are broken."""
        broken = []
        for number, shard in enumerate(self.shards):
            for name, wanted in zip(FILE_NAMES, ("sha256", "index_sha256")):
                path = self.directory / shard[name]
                if not path.is_file():
                    broken.append(f"{shard[name]}: missing")
                elif file_sha256(path) != shard[wanted]:
                    which = self._name_broken(number) if wanted == "sha256" else ""
                    broken.append(f"{shard[name]}: wrong sha256{which}")
        if broken:
            raise ShardError(f"{self.address}: {'; '.join(broken)}: copy these files again, or build the shards anew")

    def close(self) -> None:
        """Closes the files. Reading afterwards raises ShardError."""
        with self._lock:
            self._closed = True
            self._files.clear()
        self.place.close()

    def _write_columns(self, writer: Writer):
        """One shard at a time."""
        writer.append_lengths("key_starts", np.zeros(0, np.int64))
        for shard in self.shards:
            index = self._read_index(shard)
            writer.append("keys", np.frombuffer("".join(index.keys).encode("ascii"), np.uint8))
            writer.append_lengths("key_starts", np.fromiter(map(len, index.keys), np.int64))
            for name in ("num_residues", "num_turns", "spans"):
                writer.append(name, getattr(index, name))

    def _read_index(self, shard: dict) -> Index:
        name = f"{self.address}/{shard['index_file']}"
        try:
            content = self.place.read(shard["index_file"], MAX_INDEX_BYTES)
        except FileNotFoundError as error:
            raise ShardError(f"index {name} is missing, the manifest lists it: copy it again, or build anew") from error
        except OSError as error:
            raise ShardError(f"index {name} cannot be read: {error.strerror}") from error
        return parse_index(content, shard, name)

    def _checked(self, i: int, fields: tuple[str, ...], decode: Callable):
        """decode(the checked members) of sample i. A fault is looked at once more, in a file opened or fetched anew,
        before the sample is called bad."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in split {self.split!r} of {self.address}")
        try:
            return self._decode(i, fields, decode)
        except BadSample:
            number = self.shard_of(i)
            with self._lock:
                self._files.pop(number, None)
            self.place.forget(self.shards[number])
            return self._decode(i, fields, decode)

    def _decode(self, i: int, fields: tuple[str, ...], decode: Callable):
        members = self._fetch(i, fields)
        try:
            return decode(members)
        except BadSample:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._bad(i, f"members: not in the form of shards/README.md: {error}") from error

    def _of_right_length(self, i: int, what: Sample | Protein):
        """The plan reserves places by the index."""
        protein = what.protein if isinstance(what, Sample) else what
        if protein.key != self.keys[i]:
            raise self._bad(i, f"meta.json: it says {protein.key[:100]}")
        if len(protein) != self.num_residues[i]:
            raise self._bad(i, f"sequence.txt: {len(protein)} residues, the index says {self.num_residues[i]}")
        return what

    def _fetch(self, i: int, fields: tuple[str, ...]) -> dict[str, memoryview]:
        """The checked bytes of the wanted members of sample i; the ones it does not have are left out."""
        spans = {
            field: span for field, span in zip(FIELDS, self._spans[i].tolist()) if field in fields and span[0] >= 0
        }
        if not spans:
            return {}
        start = min([offset for offset, _, _ in spans.values()])
        end = max([offset + size for offset, size, _ in spans.values()])
        block = self._read_at(i, start, end - start)
        members = {}
        for field, (offset, size, crc) in spans.items():
            members[field] = block[offset - start : offset - start + size]
            if zlib.crc32(members[field]) != crc:
                raise self._bad(i, f"{field}: wrong checksum: the file is damaged, copy the shard again")
        return members

    def _read_at(self, i: int, offset: int, size: int) -> memoryview:
        """Up to `size` bytes, fewer only at the end of the file (which the checksum then tells)."""
        if not 0 <= size <= MAX_SAMPLE_BYTES:
            raise self._bad(i, f"{size} bytes by the index, wanted at most {MAX_SAMPLE_BYTES}")
        try:
            file = self._open(self.shard_of(i), i)
            # Read into an array of its own, of which the coordinates are a view that the caller may write to.
            block = memoryview(np.empty(size, np.uint8))
            done = 0
            while done < size and (num := os.preadv(file.descriptor, [block[done:]], offset + done)):
                done += num
            return block[:done]
        except OSError as error:
            raise self._bad(i, f"the shard cannot be read: {error.strerror or error}") from error
        finally:
            self.activity.text = None

    def _open(self, number: int, i: int) -> "_File":
        """The open file of a shard. One that is dropped here is closed when its last reader is done with it."""
        with self._lock:
            if self._closed:
                raise ShardError(f"{self.address}: reading after close()")
            file = self._files.get(number)
            if file:
                self._files.move_to_end(number)
        self.activity.text = f"shard {self.address}/{self.shards[number]['file']}, reading it"
        if file:
            return file
        try:
            file = _File(self.place.path(self.shards[number], self.activity))
        except ShardError as error:
            if self._closed:
                raise
            raise self._bad(i, str(error)) from error
        with self._lock:
            self._files[number] = file
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
        return file

    def _bad(self, i: int, reason: str) -> BadSample:
        return BadSample(f"{self.address}/{self.shards[self.shard_of(i)]['file']}", self.keys[i], reason)

    def _name_broken(self, shard: int) -> str:
        """Which samples of a damaged shard fail their own checksums, at most five of them by name."""
        broken = []
        for i in range(*self._starts[shard : shard + 2]):
            try:
                self._fetch(i, FIELDS)
            except ShardError:
                broken.append(self.keys[i])
        if not broken:
            return " (outside the members: tar headers or padding)"
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        return f" (broken samples: {', '.join(broken[:5])}{more})"


class _File:
    """A file descriptor that is closed with the last reference to it, so that no thread reads from a closed one."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def index_name(split: str, shards: list[dict]) -> str:
    """Name of a split's columns: a hash of the indexes that they are made of, and of their form."""
    identity = (sorted(COLUMNS.items()), FIELDS, [shard["index_sha256"] for shard in shards])
    return f"index-{split}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


def read_manifest(directory: str | Path) -> dict:
    """The manifest of a local shard directory. ShardError where there is none, or it is not one that we can read."""
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    build = f"build them with python launch/build_shards.py --structures DIR --out {directory}"
    if not directory.is_dir():
        raise ShardError(f"no shard directory {directory}: {build}")
    if not path.is_file():
        begun = any(map(SHARD_FILE.fullmatch, os.listdir(directory)))
        interrupted = " (an interrupted build lies there)" if begun else ""
        raise ShardError(f"no shards in {directory}: it has no {MANIFEST_NAME}{interrupted}: {build}")
    return parse_manifest(Here(directory, None).read(MANIFEST_NAME, MAX_MANIFEST_BYTES), str(path), build)


def _fetch_manifest(place: There) -> dict:
    return parse_manifest(place.read(MANIFEST_NAME, MAX_MANIFEST_BYTES), f"{place.address}/{MANIFEST_NAME}")
