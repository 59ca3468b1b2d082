"""Manifest and index of shards, read from bytes that nobody vouches for.

Pure: bytes in, checked numbers out. What reading relies on (names, offsets, sizes, counts) is held to sane bounds here,
so that a damaged or hostile file gives a ShardError and never a traceback, a path outside the directory, or a read that
fills the memory.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from proteingpt.data.shard_format import FIELDS, FORMAT_VERSION, MAX_KEY_LENGTH, TAR_BLOCK_BYTES, ShardError

MAX_MANIFEST_BYTES = 2**28
MAX_INDEX_BYTES = 2**28
MAX_SHARDS = 10**6
MAX_SHARD_BYTES = 2**42
MAX_SAMPLES = 2**22  # of a shard
# Of a sample, first member to last: what one read may take. 35,000 residues with their embeddings are 215 MB.
MAX_SAMPLE_BYTES = 2**29
MAX_RESIDUES = MAX_TURNS = 10**6  # of a sample

TAR_NAME = re.compile(r"[a-z]+-\d{5,12}\.tar")
INDEX_NAME = re.compile(r"[a-z]+-\d{5,12}\.index\.jsonl")
SHA256 = re.compile(r"[0-9a-f]{64}")
KEY = re.compile(rf"[!-\-0-~]{{1,{MAX_KEY_LENGTH}}}")  # printable ASCII without dot and slash


@dataclass(frozen=True)
class Index:
    """Of one shard with S samples. num_residues, num_turns: int32 (S,). spans: int64 (S, fields, 3): offset, size and
    crc32 of each member in the order of `fields`; offset -1 where a sample lacks it."""

    keys: list[str]
    num_residues: np.ndarray
    num_turns: np.ndarray
    spans: np.ndarray


def parse_manifest(content: bytes, name: str, build: str = "build the shards anew") -> dict:
    """The manifest, its splits and their shards checked. name: where it is from; build: what to do without it.
    Raises ShardError."""
    try:
        manifest = json.loads(content)
        version, splits = manifest["format_version"], manifest["splits"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{name}: not a manifest of shards ({type(error).__name__}: {error}): {build}") from error
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{name}: format version {shown(version)}, this program reads {FORMAT_VERSION}: {build} --overwrite"
        )
    if not isinstance(splits, dict) or not all(isinstance(shards, list) for shards in splits.values()):
        raise ShardError(f"{name}: not a manifest of shards (its splits are no lists of shards): {build}")
    if sum(map(len, splits.values())) > MAX_SHARDS:
        raise ShardError(f"{name}: more than {MAX_SHARDS} shards: build larger ones")
    for split, shards in splits.items():
        if not re.fullmatch(r"[a-z]{1,40}", split):
            raise ShardError(f"{name}: not a manifest of shards (a split is called {split[:40]!r}): {build}")
        for number, shard in enumerate(shards):
            if fault := record_fault(shard):
                raise ShardError(f"{name}: shard {number} of {split}: {fault}: {build}")
    totals = manifest.setdefault("totals", {})
    parts = list(totals.values()) if isinstance(totals, dict) else [None]
    if not all(isinstance(part, dict) and all(is_count(n, 2**63) for n in part.values()) for part in parts):
        raise ShardError(f"{name}: not a manifest of shards (its totals are no numbers): {build}")
    return manifest


def record_fault(shard) -> str | None:
    """What is wrong with a shard's record in the manifest, or None."""
    if not isinstance(shard, dict):
        return f"{type(shard).__name__}, wanted an object"
    for field, form in (("file", TAR_NAME), ("index_file", INDEX_NAME), ("sha256", SHA256), ("index_sha256", SHA256)):
        value = shard.get(field)
        # A name with a slash in it would be read, or written, outside the directory.
        if not isinstance(value, str) or not form.fullmatch(value):
            return f"{field} is {shown(value)}, wanted {form.pattern}"
    most = {"num_bytes": MAX_SHARD_BYTES, "num_samples": MAX_SAMPLES}
    for field in ("num_bytes", "num_samples", "num_residues", "num_turns"):
        if not is_count(shard.get(field), most.get(field, 2**53)):
            return f"{field} is {shown(shard.get(field))}, wanted a number from 0 to {most.get(field, 2**53)}"
    return None


def parse_index(content: bytes, shard: Mapping, name: str, fields: tuple[str, ...] = FIELDS) -> Index:
    """The index of a shard, held to the shard's manifest record. Raises ShardError that names the file and the line."""
    if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
        raise ShardError(f"index {name}: its sha256 is not the manifest's: copy it again, or build anew")
    lines = content.splitlines()
    if len(lines) != shard["num_samples"]:
        raise ShardError(f"index {name}: {len(lines)} samples, the manifest says {shard['num_samples']}: build anew")
    keys, counts, spans = [], [], []
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            key, members = record["key"], record["members"]
            keys.append(key)
            counts.append((record["num_residues"], record["num_turns"]))
            spans.append([members.get(field, [-1, 0, 0]) for field in fields])
            fault = line_fault(key, counts[-1], spans[-1])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            raise ShardError(f"index {name}, line {number + 1}: {fault[:300]}: copy it again, or build anew")
    numbers = np.array(counts, np.int32).reshape(len(lines), 2)
    placed = np.array(spans, np.int64).reshape(len(lines), len(fields), 3)
    if fault := place_fault(placed, shard["num_bytes"]):
        raise ShardError(f"index {name}: {fault}: copy it again, or build anew")
    return Index(keys, numbers[:, 0].copy(), numbers[:, 1].copy(), placed)


def line_fault(key, counts, spans: list) -> str | None:
    """What is wrong with the types and sizes of one line of an index, or None."""
    if not isinstance(key, str) or not KEY.fullmatch(key):
        return f"the key is {shown(key)}, wanted printable ASCII without dot and slash, as in 1cbs_A"
    if not (is_count(counts[0], MAX_RESIDUES) and is_count(counts[1], MAX_TURNS)):
        return f"{shown(counts[0])} residues and {shown(counts[1])} turns, wanted numbers up to {MAX_RESIDUES}"
    for span in spans:
        if type(span) is not list or len(span) != 3 or not all([type(n) is int and -1 <= n < 2**63 for n in span]):
            return f"a member at {shown(span)}, wanted [offset, size, crc32]"
    return None


def place_fault(spans: np.ndarray, num_bytes: int) -> str | None:
    """Whether a member lies outside the shard, or a sample is too large to read at once. spans as in Index."""
    offset, size, crc = np.moveaxis(spans, 2, 0)
    there = offset >= 0
    # Compared by differences: a sum of two hostile numbers may overflow.
    outside = there & ((offset < TAR_BLOCK_BYTES) | (size < 0) | (offset > num_bytes) | (size > num_bytes - offset))
    if outside.any():
        return f"a member outside the shard's {num_bytes} bytes"
    if ((crc < 0) | (crc >= 2**32)).any():
        return "a crc32 of more than 32 bits"
    if not there.any(axis=1).all():
        return "a sample without members"
    first = np.where(there, offset, np.iinfo(np.int64).max).min(axis=1)
    last = np.where(there, offset + np.where(there, size, 0), 0).max(axis=1)
    if len(spans) and (last - first).max() > MAX_SAMPLE_BYTES:
        return f"a sample spread over {int((last - first).max())} bytes, wanted at most {MAX_SAMPLE_BYTES}"
    return None


def is_count(value, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def shown(value) -> str:
    text = repr(value) if not isinstance(value, (list, dict)) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."


def shards_fingerprint(shards: list[Mapping]) -> str:
    """sha256 over the checksums of a split's shards."""
    lines = [f"format {FORMAT_VERSION}"] + [shard["sha256"] for shard in shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
