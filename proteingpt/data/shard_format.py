"""The format of shards, as shards/README.md specifies it: names, limits, and a sample as the bytes of its members.

What writes, reads and checks shards shares this. Arrays are `.npy` and texts JSON, so that plain WebDataset decodes
them; nothing is ever unpickled. Given up: compression, which would save 9 % and cost the positioned read.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
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
PROTEIN_FIELDS = ("backbone.npy", "confidence.npy", "meta.json", "sequence.txt")
RESERVED_METADATA = ("id", "chain", "description")

# Larger ones (infinity among them) overflow in a distance squared, and are no structure.
MAX_COORDINATE = 1e6
NPY_SHAPE = rb"\(((?:\d{1,9}, ?)*(?:\d{1,9})?)\)"
NPY_HEADER = re.compile(rb"\{'descr': '<f4', 'fortran_order': False, 'shape': " + NPY_SHAPE + rb", \} *\n")

TAR_BLOCK_BYTES = 512
# A ustar header has 100 bytes for `KEY.confidence.npy`.
MAX_KEY_LENGTH = 100 - max(len(f".{field}") for field in FIELDS)

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
        return sum(TAR_BLOCK_BYTES + padded(len(data)) for data in self.members.values())


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


def decode_sample(members: Mapping[str, memoryview]) -> Sample:
    """The sample in its members, the reverse of `encode_sample`. Raises ValueError or KeyError on other content."""
    meta = decode_meta(members)
    protein = decode_protein(members, meta)
    metadata = {name: value for name, value in meta.items() if name not in RESERVED_METADATA}
    return Sample(protein, meta["description"], decode_turns(members), metadata=metadata)


def decode_protein(members: Mapping[str, memoryview], meta: dict | None = None) -> Protein:
    """The protein alone; qa.json is not needed. Its arrays are views of the members. Raises as decode_sample."""
    meta = decode_meta(members) if meta is None else meta
    backbone = _decode_npy(members["backbone.npy"])
    confidence = members.get("confidence.npy")
    # NaN stands for what is not resolved, and compares as small.
    if (np.abs(backbone) > MAX_COORDINATE).any():
        raise ValueError(f"a coordinate beyond {MAX_COORDINATE:g} angstrom")
    return Protein(
        id=meta["id"],
        chain=meta["chain"],
        sequence=str(members["sequence.txt"], "ascii"),
        backbone=backbone,
        confidence=None if confidence is None else _decode_npy(confidence),
    )


def decode_meta(members: Mapping[str, memoryview]) -> dict:
    meta = json.loads(str(members["meta.json"], "utf-8"))
    if not isinstance(meta, dict) or not all([isinstance(meta.get(name), str) for name in RESERVED_METADATA]):
        raise ValueError(f"meta.json: wanted an object with {', '.join(RESERVED_METADATA)}, all texts")
    return meta


def decode_turns(members: Mapping[str, memoryview]) -> tuple[Turn, ...]:
    turns = json.loads(str(members["qa.json"], "utf-8"))
    questions, answers = [turn["Q"] for turn in turns], [turn["A"] for turn in turns]
    if not set(map(type, questions)) | set(map(type, answers)) <= {str}:
        raise ValueError("qa.json: wanted questions and answers that are texts")
    return tuple(map(Turn, questions, answers))


def _decode_npy(data: memoryview) -> np.ndarray:
    """The array in a version 1.0 .npy member, as a view of it."""
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not a version 1.0 .npy member")
    end = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape = _parse_npy_header(bytes(data[10:end]))
    return np.frombuffer(data, dtype, offset=end).reshape(shape)


@functools.lru_cache(maxsize=8192)
def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape, in the one spelling that numpy writes: nothing is evaluated. Cached, because lengths recur."""
    found = NPY_HEADER.fullmatch(header)
    if not found:
        raise ValueError(f"the .npy header is {header[:100]!r}, wanted float32 in C order as numpy writes it")
    return np.dtype("<f4"), tuple(int(size) for size in found[1].split(b",") if size.strip())


def padded(size: int) -> int:
    """Bytes that `size` bytes take in a tar."""
    return -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


@functools.cache
def program_versions() -> dict[str, str]:
    """The versions of what may change the bytes: {"format": ..., "proteingpt": ..., "biotite": ..., "numpy": ...}.

    Looked up once: it takes a millisecond, and a build of the whole archive asks for each entry.
    """
    return {"format": str(FORMAT_VERSION), **{name: metadata.version(name) for name in VERSIONED}}


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def totals_of(shards: list[dict]) -> dict[str, int]:
    """What the manifest says of a split, by the records of its shards."""
    names = ("num_samples", "num_residues", "num_turns", "num_bytes")
    return {"num_shards": len(shards), **{name: sum(shard[name] for shard in shards) for name in names}}
