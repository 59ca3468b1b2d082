"""Everything that is wrong with a shard directory, for `launch/shards.py verify`.

Tars are walked by a reader of our own, which takes headers of 512 bytes and nothing else into memory: a hostile header
may announce terabytes, links, or names that climb out of a directory, and a library would follow some of them.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from proteingpt.data.manifest import parse_index
from proteingpt.data.shard_format import (
    FILE_NAMES,
    MANIFEST_NAME,
    SHARD_FILE,
    ShardError,
    check_key,
    decode_sample,
    file_sha256,
    totals_of,
)
from proteingpt.data.shard_set import read_manifest
from proteingpt.data.tar_headers import TarError, tar_members


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
        if manifest["totals"].get(split) != totals_of(shards):
            faults.append(f"{MANIFEST_NAME}: the totals of {split} are not the sums over its shards")
    listed = {shard[name] for shards in manifest["splits"].values() for shard in shards for name in FILE_NAMES}
    strays = sorted(n for n in os.listdir(directory) if SHARD_FILE.fullmatch(n) and n not in listed)
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
        content = (directory / shard["index_file"]).read_bytes()
        records = [json.loads(line) for line in content.splitlines()]
        faults += [f"{shard['file']}: {fault}" for fault in _count_faults(shard, records)]
        # What is beyond all bounds is not read by: the reader refuses it, too.
        as_found = shard | {"num_samples": len(records), "index_sha256": hashlib.sha256(content).hexdigest()}
        parse_index(content, as_found, shard["index_file"])
        faults += [f"{shard['file']}: {fault}" for fault in _walk_faults(directory / shard["file"], records)]
        for record in records:
            if record["key"] in key_shards:
                faults.append(f"{shard['file']}: sample {record['key']} is also in {key_shards[record['key']]}")
            key_shards.setdefault(record["key"], shard["file"])
    except ShardError as error:
        faults.append(str(error))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        for member in tar_members(path):
            if member.fault:
                yield member.fault
            if member.name in found:
                yield f"member {member.name} occurs twice"
            found[member.name] = (member.offset, member.size)
    except TarError as error:
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"cannot be decoded: {type(error).__name__}: {error}"
    protein = sample.protein
    if sample.key != record["key"]:
        return f"its meta.json says {sample.key}"
    if (len(protein), len(sample.turns)) != (record["num_residues"], record["num_turns"]):
        return f"{len(protein)} residues and {len(sample.turns)} turns, the index says otherwise"
    # A published embedding stands for a structure that is not there.
    if not protein.resolved.any() and "embedding" not in sample.metadata:
        return "no residue of it has all three backbone atoms"
    confidence = protein.confidence
    if confidence is not None and not ((confidence >= 0) & (confidence <= 1)).all():
        return "its confidence is not between 0 and 1"
    return None
