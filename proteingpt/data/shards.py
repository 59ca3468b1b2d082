"""Shards: WebDataset tars with an index and a manifest beside them. The format is specified in shards/README.md.

Any WebDataset reader can read the tars. Our own reader does not walk them: it takes each sample by one positioned read
at the offset the index gives, and compares checksums, because a plain tar reader drops or alters samples silently when
a header or a byte is damaged. Given up: compression, which would save 9 % and cost the positioned read.
"""

import ast
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from proteingpt.protein import Protein, Sample, Turn

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# In the order in which the tar holds them. WebDataset's writer sorts by name.
FIELDS = ("backbone.npy", "confidence.npy", "meta.json", "qa.json", "sequence.txt")
TEXT_FIELDS = ("meta.json", "qa.json")
RESERVED_METADATA = ("id", "chain", "description")

TAR_BLOCK_BYTES = 512
# A ustar header has 100 bytes for `KEY.confidence.npy`.
MAX_KEY_LENGTH = 100 - max(len(f".{field}") for field in FIELDS)
# Beyond this many shards a file is opened for each read, so that no limit on open files is met.
MAX_OPEN_SHARDS = 512

SHARD_FILE = re.compile(r"[a-z]+-\d{5,}\.(tar|index\.jsonl)(\.partial)?")
# Entries of a shard's manifest record that name files.
FILE_NAMES = ("file", "index_file")
# Programs whose version may change the bytes of a shard; the manifest names them.
VERSIONED = ("proteingpt", "biotite", "numpy")


class ShardError(ValueError):
    """Shards that cannot be written as asked, or are not there, not whole, or not what their manifest says."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the bytes of its members, {field: bytes}, with the numbers that the index keeps."""

    key: str
    num_residues: int
    num_turns: int
    members: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes the members take in a tar, headers and padding included."""
        return sum(TAR_BLOCK_BYTES + _padded(len(data)) for data in self.members.values())


# --- writing --------------------------------------------------------------------------------------------------------


def check_key(key: str) -> None:
    """Refuses a sample key that a tar reader would split elsewhere, or that a tar header cannot hold.

    WebDataset cuts the member name at its first dot after the last slash, so `1abc.A` would merge with `1abc.B`.
    Raises ShardError naming the key and the character.
    """
    if not key:
        raise ShardError("the sample key is empty: wanted an entry id and a chain, as in 1cbs_A")
    bad = sorted({character for character in key if character in "./" or not "!" <= character <= "~"})
    if bad:
        raise ShardError(
            f"sample key {key!r} holds {', '.join(map(repr, bad))}: the tar convention would split or lose it; "
            "wanted printable ASCII without dots, slashes and blanks: rename the entry or the chain"
        )
    if len(key) > MAX_KEY_LENGTH:
        raise ShardError(f"sample key {key!r} has {len(key)} characters, a tar header holds {MAX_KEY_LENGTH}: rename")


def write_shards(
    directory: str | Path,
    samples_by_split: Mapping[str, Iterable[Sample | EncodedSample]],
    *,
    samples_per_shard: int | None,
    options: dict,
    bytes_per_shard: int | None = None,
) -> dict:
    """Writes each split as `SPLIT-00000.tar` and so on with an index beside each, then the manifest, and returns it.

    A shard ends before the sample that would make it larger than samples_per_shard or bytes_per_shard (None: no limit).
    Samples are taken one at a time, split after split; the same samples give the same bytes. Each file is written
    aside and renamed, the manifest last, so a directory with a manifest is whole. Shards that lie in the directory are
    replaced: their manifest goes first. options: JSON values, kept in the manifest as they are.
    Raises ShardError for a refused or repeated key, metadata that is not JSON, or an unusable split name.
    """
    for name, limit in (("samples_per_shard", samples_per_shard), ("bytes_per_shard", bytes_per_shard)):
        if limit is not None and limit < 1:
            raise ShardError(f"{name} is {limit}, wanted at least 1")
    for split in samples_by_split:
        if not re.fullmatch(r"[a-z]+", split):
            raise ShardError(f"split name {split!r}: wanted lower-case letters only, as in train")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    remove_shards(directory)
    keys: set[str] = set()
    splits = {
        split: [
            _write_shard(directory, f"{split}-{number:05d}", shard, keys)
            for number, shard in enumerate(_cut_shards(samples, samples_per_shard, bytes_per_shard))
        ]
        for split, samples in samples_by_split.items()
    }
    manifest = {
        "format": "proteingpt-shards",
        "format_version": FORMAT_VERSION,
        "versions": program_versions(),
        "options": options,
        "totals": {split: _totals(shards) for split, shards in splits.items()},
        "splits": splits,
    }
    with replacing(directory / MANIFEST_NAME) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def existing_shards(directory: str | Path) -> list[Path]:
    """The manifest, shards and indexes in `directory`, sorted, those of an interrupted build included."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    ours = (path for path in directory.iterdir() if path.name == MANIFEST_NAME or SHARD_FILE.fullmatch(path.name))
    return sorted(ours)


def remove_shards(directory: str | Path) -> None:
    """Removes the shards in `directory`, the manifest first, so that no moment shows a manifest without its shards."""
    for path in sorted(existing_shards(directory), key=lambda path: path.name != MANIFEST_NAME):
        path.unlink()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """A binary file written aside as `NAME.partial`, fsynced, and renamed to `path` on success.

    After an exception the partial file is removed and `path` is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    _fsync_directory(path.parent)


def _fsync_directory(directory: Path) -> None:
    """Makes a rename survive a power cut: it lives in the directory, not in the file."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut_shards(
    samples: Iterable[Sample | EncodedSample], max_samples: int | None, max_bytes: int | None
) -> Iterator[Iterator[EncodedSample]]:
    """The samples in runs, each one shard. Takes them only as it gives them: each run is to be used up in its turn."""
    encoded = (sample if isinstance(sample, EncodedSample) else encode_sample(sample) for sample in samples)
    waiting = None

    def run() -> Iterator[EncodedSample]:
        nonlocal waiting
        num_samples = num_bytes = 0
        while waiting is not None:
            num_bytes += waiting.num_bytes
            if num_samples and max_bytes is not None and num_bytes > max_bytes:
                return
            num_samples += 1
            yield waiting
            waiting = None if num_samples == max_samples else next(encoded, None)

    while (waiting := waiting or next(encoded, None)) is not None:
        yield run()


def _write_shard(directory: Path, name: str, samples: Iterable[EncodedSample], keys: set[str]) -> dict:
    """Writes `NAME.tar` and `NAME.index.jsonl`; returns their manifest record. `keys` gathers those already used."""
    tar_path, index_path = directory / f"{name}.tar", directory / f"{name}.index.jsonl"
    with replacing(tar_path) as file:
        records = _write_tar(file, samples, keys)
    with replacing(index_path) as file:
        file.writelines(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)
    return {
        "file": tar_path.name,
        "sha256": file_sha256(tar_path),
        "num_bytes": tar_path.stat().st_size,
        "index_file": index_path.name,
        "index_sha256": file_sha256(index_path),
        "num_samples": len(records),
        "num_residues": sum(record["num_residues"] for record in records),
        "num_turns": sum(record["num_turns"] for record in records),
    }


def _write_tar(file: io.BufferedWriter, samples: Iterable[EncodedSample], keys: set[str]) -> list[dict]:
    """Writes the samples as a WebDataset tar into `file`; returns their index records in order."""
    # Late, because it imports torch, which the processes that parse structures do not need.
    from webdataset import TarWriter

    records = []
    # mtime as the integer 0: a float, or the clock, would make PAX headers and bytes that differ at each build.
    with TarWriter(file, user="", group="", mode=0o444, encoder=False, mtime=0, compress=False) as writer:
        for sample in samples:
            check_key(sample.key)
            if sample.key in keys:
                raise ShardError(f"sample key {sample.key!r} occurs twice: a tar reader would merge the two samples")
            keys.add(sample.key)
            spans, end = _place_members(sample.members, writer.tarstream.offset)
            writer.write({"__key__": sample.key, **sample.members})
            assert writer.tarstream.offset == end, "webdataset laid the members out otherwise than the index says"
            numbers = {"num_residues": sample.num_residues, "num_turns": sample.num_turns}
            records.append({"key": sample.key, **numbers, "members": spans})
    return records


def _place_members(members: Mapping[str, bytes], start: int) -> tuple[dict[str, list[int]], int]:
    """Where the data of each member will lie in the tar: {field: [offset, size, crc32]}, and the end of the last."""
    spans, position = {}, start
    for field in sorted(members):
        data = members[field]
        offset = position + TAR_BLOCK_BYTES
        spans[field] = [offset, len(data), zlib.crc32(data)]
        position = offset + _padded(len(data))
    return spans, position


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


def encode_sample(sample: Sample) -> EncodedSample:
    """The sample as bytes. Raises ShardError where the metadata is not plain JSON."""
    protein = sample.protein
    clash = [name for name in RESERVED_METADATA if name in sample.metadata]
    if clash:
        raise ShardError(f"sample {sample.key}: metadata may not hold {', '.join(clash)}: meta.json has its own")
    meta = {"id": protein.id, "chain": protein.chain, "description": sample.description, **sample.metadata}
    members = {
        "backbone.npy": _encode_npy(protein.backbone),
        "meta.json": _encode_json(meta, sample.key),
        "qa.json": _encode_json([{"Q": turn.question, "A": turn.answer} for turn in sample.turns], sample.key),
        "sequence.txt": protein.sequence.encode("ascii"),
    }
    if protein.confidence is not None:
        members["confidence.npy"] = _encode_npy(protein.confidence)
    return EncodedSample(sample.key, len(protein), len(sample.turns), members)


def _encode_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array, dtype="<f4"), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _encode_json(value, key: str) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ShardError(f"sample {key}: {error}; wanted JSON values only") from error


def _totals(shards: list[dict]) -> dict[str, int]:
    names = ("num_samples", "num_residues", "num_turns", "num_bytes")
    return {"num_shards": len(shards), **{name: sum(shard[name] for shard in shards) for name in names}}


def program_versions() -> dict[str, str]:
    """The versions of what may change the bytes: {"format": ..., "proteingpt": ..., "biotite": ..., "numpy": ...}."""
    return {"format": str(FORMAT_VERSION), **{name: metadata.version(name) for name in VERSIONED}}


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


class ShardSet:
    """The samples of one split, by number, in the order of the shards. Safe to read from several threads.

    keys: list of S sample keys. num_residues, num_turns: int32 (S,). manifest: the whole manifest.
    fingerprint: sha256 over the checksums of the split's shards; two sets with the same one hold the same samples.
    Opening reads the manifest and the indexes and compares the shards' sizes; `verify` compares every byte.
    Raises ShardError that names what is missing or broken.
    """

    def __init__(self, directory: str | Path, split: str):
        self.directory = Path(directory)
        self.split = split
        self.manifest = read_manifest(self.directory)
        if split not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"]) or "none"
            raise ShardError(f"no split {split!r} in {self.directory}: there are {known}")
        self.shards: list[dict] = self.manifest["splits"][split]
        self.fingerprint = _fingerprint(self.shards)
        for shard in self.shards:
            _check_size(self.directory, shard)
        records = [_read_index(self.directory, shard) for shard in self.shards]
        self.keys = [record["key"] for record in itertools.chain(*records)]
        self.num_residues = np.array([r["num_residues"] for r in itertools.chain(*records)], np.int32)
        self.num_turns = np.array([r["num_turns"] for r in itertools.chain(*records)], np.int32)
        # int64 (S, fields, 3): offset, size, crc32; offset -1 where a sample lacks the field.
        self._spans = np.array([_spans(r["members"]) for r in itertools.chain(*records)], np.int64)
        self.shard_numbers = np.repeat(np.arange(len(records)), [len(r) for r in records])
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> Sample:
        """Sample i, by one positioned read. Arrays are float32, owned by the caller and writable.

        Raises ShardError naming shard, key and field where a checksum is wrong, IndexError where there is no sample i.
        """
        members = self._fetch(i, FIELDS)
        return self._decode(i, lambda: decode_sample(members))

    def read_text(self, i: int) -> tuple[str, tuple[Turn, ...]]:
        """Description and turns of sample i, without reading its coordinates. Raises as `read` does."""
        members = self._fetch(i, TEXT_FIELDS)
        return self._decode(i, lambda: (_decode_meta(members)["description"], _decode_turns(members)))

    def verify(self) -> None:
        """Compares every shard and index of the split with its sha256; raises one ShardError that names all broken."""
        broken = []
        for number, shard in enumerate(self.shards):
            for name, wanted in ((shard["file"], "sha256"), (shard["index_file"], "index_sha256")):
                path = self.directory / name
                if not path.is_file():
                    broken.append(f"{name}: missing")
                elif file_sha256(path) != shard[wanted]:
                    broken.append(f"{name}: wrong sha256{self._name_broken(number) if wanted == 'sha256' else ''}")
        if broken:
            raise ShardError(f"{self.directory}: {'; '.join(broken)}: copy these files again, or build the shards anew")

    def close(self) -> None:
        """Closes the files. Reading afterwards raises ShardError."""
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _fetch(self, i: int, fields: tuple[str, ...]) -> dict[str, memoryview]:
        """The checked bytes of the wanted members of sample i; the ones it does not have are left out."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in split {self.split!r} of {self.directory}")
        every_span = self._spans[i].tolist()
        spans = {field: span for field, span in zip(FIELDS, every_span) if field in fields and span[0] >= 0}
        start = min(offset for offset, _, _ in spans.values())
        end = max(offset + size for offset, size, _ in spans.values())
        block = memoryview(self._read_at(int(self.shard_numbers[i]), start, end - start))
        members = {}
        for field, (offset, size, crc) in spans.items():
            members[field] = block[offset - start : offset - start + size]
            if zlib.crc32(members[field]) != crc:
                raise self._error(i, field, "wrong checksum: the file is damaged, copy the shard again")
        return members

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end of the file (which the checksum then tells)."""
        descriptor, cached = self._open(shard)
        try:
            block = os.pread(descriptor, size, offset)
            while len(block) < size and (more := os.pread(descriptor, size - len(block), offset + len(block))):
                block += more
            return block
        except OSError as error:
            raise ShardError(f"{self.directory / self.shards[shard]['file']}: cannot be read: {error}") from error
        finally:
            if not cached:
                os.close(descriptor)

    def _open(self, shard: int) -> tuple[int, bool]:
        """File descriptor of a shard, and whether it is kept open for later reads."""
        with self._lock:
            if self._closed:
                raise ShardError(f"{self.directory}: reading after close()")
            if shard in self._descriptors:
                return self._descriptors[shard], True
            path = self.directory / self.shards[shard]["file"]
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"shard {path} cannot be opened: {error.strerror}") from error
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                return descriptor, False
            self._descriptors[shard] = descriptor
            return descriptor, True

    def _decode(self, i: int, decode: Callable):
        try:
            return decode()
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(i, "members", f"not in the form of shards/README.md: {error}") from error

    def _error(self, i: int, field: str, what: str) -> ShardError:
        shard = self.shards[self.shard_numbers[i]]["file"]
        return ShardError(f"shard {self.directory / shard}, sample {self.keys[i]}, {field}: {what}")

    def _name_broken(self, shard: int) -> str:
        """Which samples of a damaged shard fail their own checksums, at most five of them by name."""
        broken = []
        for i in np.flatnonzero(self.shard_numbers == shard).tolist():
            try:
                self._fetch(i, FIELDS)
            except ShardError:
                broken.append(self.keys[i])
        if not broken:
            return " (outside the members: tar headers or padding)"
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        return f" (broken samples: {', '.join(broken[:5])}{more})"


def read_manifest(directory: str | Path) -> dict:
    """The manifest of a shard directory. Raises ShardError where there is none, or it is not one that we can read."""
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    build = f"build them with python launch/build_shards.py --structures DIR --out {directory}"
    if not directory.is_dir():
        raise ShardError(f"no shard directory {directory}: {build}")
    if not path.is_file():
        interrupted = " (an interrupted build lies there)" if existing_shards(directory) else ""
        raise ShardError(f"no shards in {directory}: it has no {MANIFEST_NAME}{interrupted}: {build}")
    try:
        manifest = json.loads(path.read_bytes())
        version, _ = manifest["format_version"], manifest["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a manifest of shards ({type(error).__name__}: {error}): {build}") from error
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}: {build} --overwrite"
        )
    return manifest


def decode_sample(members: Mapping[str, memoryview]) -> Sample:
    """The sample in its members, the reverse of `encode_sample`. Raises ValueError or KeyError on other content."""
    meta = _decode_meta(members)
    confidence = members.get("confidence.npy")
    protein = Protein(
        id=meta.pop("id"),
        chain=meta.pop("chain"),
        sequence=str(members["sequence.txt"], "ascii"),
        backbone=_decode_npy(members["backbone.npy"]),
        confidence=None if confidence is None else _decode_npy(confidence),
    )
    return Sample(protein, meta.pop("description"), _decode_turns(members), metadata=meta)


def _decode_meta(members: Mapping[str, memoryview]) -> dict:
    return json.loads(bytes(members["meta.json"]))


def _decode_turns(members: Mapping[str, memoryview]) -> tuple[Turn, ...]:
    return tuple(Turn(turn["Q"], turn["A"]) for turn in json.loads(bytes(members["qa.json"])))


def _decode_npy(data: memoryview) -> np.ndarray:
    """The array in a version 1.0 .npy member, as a copy of its own."""
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not a version 1.0 .npy member")
    end = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape = _parse_npy_header(bytes(data[10:end]))
    return np.frombuffer(data, dtype, offset=end).reshape(shape).copy()


@functools.lru_cache(maxsize=8192)
def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape. Cached because evaluating the header is what makes np.load slow, and lengths recur."""
    fields = ast.literal_eval(header.decode("latin1"))
    if fields["fortran_order"]:
        raise ValueError(".npy member in Fortran order, wanted C order")
    return np.dtype(fields["descr"]), fields["shape"]


def _fingerprint(shards: list[dict]) -> str:
    lines = [f"format {FORMAT_VERSION}"] + [shard["sha256"] for shard in shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_size(directory: Path, shard: dict) -> None:
    path = directory / shard["file"]
    try:
        size = path.stat().st_size
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        raise ShardError(f"shard {path} is missing, the manifest lists it: copy it again, or build anew") from error
    if size != shard["num_bytes"]:
        raise ShardError(
            f"shard {path} has {size} bytes, the manifest says {shard['num_bytes']}: copy it again, or build anew"
        )


def _read_index(directory: Path, shard: dict) -> list[dict]:
    path = directory / shard["index_file"]
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ShardError(f"index {path} is missing, the manifest lists it: copy it again, or build anew") from error
    if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
        raise ShardError(f"index {path}: its sha256 is not the manifest's: copy it again, or build anew")
    return [json.loads(line) for line in content.splitlines()]


def _spans(members: Mapping[str, list[int]]) -> list[list[int]]:
    return [members.get(field, [-1, 0, 0]) for field in FIELDS]


# --- checking -------------------------------------------------------------------------------------------------------


def find_faults(directory: str | Path) -> list[str]:
    """Everything that is wrong with a shard directory, one line each; empty where it is whole.

    Compares sizes and checksums with the manifest; walks each tar with a plain reader and compares its members with
    the index; decodes every sample and holds it to shards/README.md; compares the counts; looks for keys that occur
    twice and for files that the manifest does not list. Raises ShardError only where there is no manifest to go by.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    faults, key_shards = [], {}
    for split, shards in manifest["splits"].items():
        for shard in shards:
            faults += _shard_faults(directory, shard, key_shards)
        if manifest["totals"].get(split) != _totals(shards):
            faults.append(f"{MANIFEST_NAME}: the totals of {split} are not the sums over its shards")
    listed = {shard[name] for shards in manifest["splits"].values() for shard in shards for name in FILE_NAMES}
    strays = [path.name for path in existing_shards(directory) if path.name not in listed | {MANIFEST_NAME}]
    return faults + [f"{name}: the manifest does not list it" for name in strays]


def _shard_faults(directory: Path, shard: dict, key_shards: dict[str, str]) -> list[str]:
    """The faults of one shard and its index. key_shards: {key: shard it was first found in}, added to."""
    faults = []
    for name, wanted in zip(FILE_NAMES, ("sha256", "index_sha256")):
        path = directory / shard[name]
        if not path.is_file():
            return faults + [f"{shard[name]}: missing"]
        if file_sha256(path) != shard[wanted]:
            faults.append(f"{shard[name]}: wrong sha256")
    size = (directory / shard["file"]).stat().st_size
    if size != shard["num_bytes"]:
        faults.append(f"{shard['file']}: {size} bytes, the manifest says {shard['num_bytes']}")
    try:
        records = [json.loads(line) for line in (directory / shard["index_file"]).read_bytes().splitlines()]
        faults += [f"{shard['file']}: {fault}" for fault in _count_faults(shard, records)]
        faults += [f"{shard['file']}: {fault}" for fault in _walk_faults(directory / shard["file"], records)]
        for record in records:
            if record["key"] in key_shards:
                faults.append(f"{shard['file']}: sample {record['key']} is also in {key_shards[record['key']]}")
            key_shards.setdefault(record["key"], shard["file"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        faults.append(f"{shard['index_file']}: not an index ({type(error).__name__}: {error})")
    return faults


def _count_faults(shard: dict, records: list[dict]) -> Iterator[str]:
    found = {"num_samples": len(records)}
    found |= {name: sum(record[name] for record in records) for name in ("num_residues", "num_turns")}
    for name, count in found.items():
        if count != shard[name]:
            yield f"the index has {name} {count}, the manifest says {shard[name]}"


def _walk_faults(path: Path, records: list[dict]) -> Iterator[str]:
    """What a plain tar reader finds otherwise than the index says, and what the members hold that they may not."""
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name in found:
                    yield f"member {member.name} occurs twice"
                found[member.name] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        yield f"a tar reader stops after {len(found)} members: {error}"
    wanted = {f"{record['key']}.{field}": span for record in records for field, span in record["members"].items()}
    if missing := [name for name in wanted if name not in found]:
        yield f"a tar reader does not find {_first_of(missing)}"
    if extra := [name for name in found if name not in wanted]:
        yield f"the index does not list {_first_of(extra)}"
    if moved := [name for name, span in wanted.items() if name in found and found[name] != tuple(span[:2])]:
        yield f"the index has another place or size for {_first_of(moved)}"
    if not missing and list(found) != list(wanted) and not extra:
        yield "the members are not in the order of the index"
    with open(path, "rb") as file:
        for record in records:
            fault = _sample_fault(file, record)
            if fault:
                yield f"sample {record['key']}: {fault}"


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sample_fault(file: io.BufferedReader, record: dict) -> str | None:
    """What is wrong with the sample at the index's offsets, or None."""
    members = {}
    for field, (offset, size, crc) in record["members"].items():
        file.seek(offset)
        members[field] = memoryview(file.read(size))
        if zlib.crc32(members[field]) != crc:
            return f"{field} has a wrong checksum"
    try:
        check_key(record["key"])
        sample = decode_sample(members)
    except (ValueError, KeyError, TypeError) as error:
        return f"cannot be decoded: {type(error).__name__}: {error}"
    protein = sample.protein
    if sample.key != record["key"]:
        return f"its meta.json says {sample.key}"
    if (len(protein), len(sample.turns)) != (record["num_residues"], record["num_turns"]):
        return f"{len(protein)} residues and {len(sample.turns)} turns, the index says otherwise"
    if np.isinf(protein.backbone).any():
        return "its backbone has infinite coordinates"
    # A published embedding stands for a structure that is not there.
    if not protein.resolved.any() and "embedding" not in sample.metadata:
        return "no residue of it has all three backbone atoms"
    confidence = protein.confidence
    if confidence is not None and not ((confidence >= 0) & (confidence <= 1)).all():
        return "its confidence is not between 0 and 1"
    return None
