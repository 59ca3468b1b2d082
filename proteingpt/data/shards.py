"""Shards: WebDataset tars with an index and a manifest beside them. The format is specified in shards/README.md.

This is the door: writing is here, and what others need of reading (shard_set), checking (shard_faults) and the format
(shard_format) is named here. Any WebDataset reader can read the tars; ours does not walk them.
"""

import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from proteingpt.data.shard_cache import ShardCache
from proteingpt.data.shard_faults import find_faults
from proteingpt.data.shard_format import (
    FIELDS,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SHARD_FILE,
    TAR_BLOCK_BYTES,
    TEXT_FIELDS,
    EncodedSample,
    ShardError,
    check_key,
    encode_sample,
    file_sha256,
    padded,
    program_versions,
    replacing,
    totals_of,
)
from proteingpt.data.shard_set import BadSample, NoSplit, ShardSet, read_manifest
from proteingpt.protein import Sample

__all__ = [
    "FIELDS", "MANIFEST_NAME", "TEXT_FIELDS", "BadSample", "EncodedSample", "NoSplit", "ShardCache", "ShardError",
    "ShardSet", "check_key", "encode_sample", "existing_shards", "file_sha256", "find_faults", "program_versions",
    "read_manifest", "remove_shards", "replacing", "write_shards",
]  # fmt: skip


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
        "totals": {split: totals_of(shards) for split, shards in splits.items()},
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


def load_tar_writer() -> type:
    """webdataset's writer. Late, because it imports torch, which the processes that parse structures do not need."""
    from webdataset import TarWriter

    return TarWriter


def _write_tar(file: io.BufferedWriter, samples: Iterable[EncodedSample], keys: set[str]) -> list[dict]:
    """Writes the samples as a WebDataset tar into `file`; returns their index records in order."""
    TarWriter, records = load_tar_writer(), []
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
        position = offset + padded(len(data))
    return spans, position
