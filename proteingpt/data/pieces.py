"""What an unfinished build keeps: parsed samples, in pieces that any later start of it can take up.

A piece is the parsed and encoded outcome of a batch of files: `NAME.data` holds the members of its samples one after
the other, `NAME.json` what they are and what was set aside; the latter is renamed into place last, so it is the
commit. Each outcome is known by a key over the file's identity, its texts and the options, so that a change of any of
them parses that file again and no other. Workers write pieces themselves: no sample travels between processes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import socket
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from proteingpt.data.filters import PASSING, Filters, Skip
from proteingpt.data.shards import FIELDS, EncodedSample, program_versions, replacing
from proteingpt.data.sources import Job

WORK_NAME = ".build"
OPTIONS_NAME = "options.json"
LOCK_NAME = ".building"


class Busy(ValueError):
    """Another build writes to the directory."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A sample in a piece. sequence: its sha256; entity: the polymer entity, where known; sizes: {field: bytes}."""

    key: str
    chain: str
    entity: str | None
    sequence: str
    num_residues: int
    num_turns: int
    piece: str
    offset: int
    sizes: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Parsed:
    """What one entry gave. key: `job_key` of it; file: what it was read from.

    date: ISO day of release, else the year of deposition, else None. others: the entry's other files, and why they were
    not taken.
    """

    key: str
    file: str
    entry: str
    date: str | None
    samples: tuple[Stored, ...] = ()
    skips: tuple[Skip, ...] = ()
    others: tuple[Skip, ...] = ()


def job_key(job: Job, filters: Filters) -> str:
    """Changes with the files (name, size, time of its last change), its texts, the options, and the programs."""
    files = [(file, path.stat()) for path, file in ((job.path, job.file), *job.others)]
    states = [(file, state.st_size, state.st_mtime_ns) for file, state in files]
    identity = [states, job.is_model, dataclasses.asdict(job.text)]
    content = json.dumps([program_versions(), dataclasses.asdict(filters), identity], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def write_piece(work: Path, outcomes: Iterable[tuple[Parsed, list[tuple[EncodedSample, Stored]]]]) -> list[Parsed]:
    """Writes the samples of these outcomes as one piece; returns the outcomes with the place of each sample."""
    outcomes = list(outcomes)
    name = hashlib.blake2b("".join(parsed.key for parsed, _ in outcomes).encode(), digest_size=16).hexdigest()
    placed, crc, offset = [], 0, 0
    partial = work / f"{name}.data.partial"
    with open(partial, "wb") as file:
        for parsed, samples in outcomes:
            stored = []
            for encoded, sample in samples:
                members = {field: encoded.members[field] for field in FIELDS if field in encoded.members}
                sizes = {field: len(data) for field, data in members.items()}
                stored.append(dataclasses.replace(sample, piece=name, offset=offset, sizes=sizes))
                for data in members.values():
                    file.write(data)
                    crc, offset = zlib.crc32(data, crc), offset + len(data)
            placed.append(dataclasses.replace(parsed, samples=tuple(stored)))
    os.replace(partial, work / f"{name}.data")
    content = {"size": offset, "crc32": crc, "outcomes": [dataclasses.asdict(parsed) for parsed in placed]}
    partial = work / f"{name}.json.partial"
    partial.write_text(json.dumps(content))
    os.replace(partial, work / f"{name}.json")
    return placed


def load_pieces(work: Path, wanted: Iterable[str]) -> dict[str, Parsed]:
    """{job key: outcome} of every whole piece that holds one of the wanted keys; the others are removed. What a disk or
    a time limit kept from being read is not among them."""
    wanted, found = set(wanted), {}
    for path in sorted(work.glob("*.json")):
        if path.name == OPTIONS_NAME:
            continue
        outcomes = [parsed for parsed in _load_piece(path) if parsed.key in wanted and _is_final(parsed)]
        found |= {parsed.key: parsed for parsed in outcomes}
        if not outcomes:
            path.unlink()
            path.with_suffix(".data").unlink(missing_ok=True)
    return found


def _is_final(parsed: Parsed) -> bool:
    return not any(skip.reason in PASSING for skip in parsed.skips)


def _load_piece(path: Path) -> list[Parsed]:
    """The outcomes of a piece; none where it is damaged, as a power cut may leave what was not yet on disk."""
    try:
        content = json.loads(path.read_bytes())
        data = path.with_suffix(".data").read_bytes()
        if (len(data), zlib.crc32(data)) != (content["size"], content["crc32"]):
            return []
        return [_restore(outcome) for outcome in content["outcomes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _restore(outcome: dict) -> Parsed:
    samples = tuple(Stored(**sample) for sample in outcome["samples"])
    skips, others = (tuple(Skip(**skip) for skip in outcome[name]) for name in ("skips", "others"))
    return Parsed(**{**outcome, "samples": samples, "skips": skips, "others": others})


def read_stored(work: Path, sample: Stored) -> EncodedSample:
    """The bytes of a sample in a piece."""
    with open(work / f"{sample.piece}.data", "rb") as file:
        file.seek(sample.offset)
        members = {field: file.read(size) for field, size in sample.sizes.items()}
    return EncodedSample(sample.key, sample.num_residues, sample.num_turns, members)


# --- the directory --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(out: Path) -> Iterator[None]:
    """Keeps every other build out of `out`, which is made if it is not there, and removed again if it stays empty.

    The lock goes with the process, however that ends. On a file system without locks nothing is kept out.
    Raises Busy where another build, on this machine or another, holds it.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK_NAME
    try:
        with open(path, "a+", encoding="utf-8") as file:
            _lock(file, path)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            if is_new:
                out.rmdir()


def _lock(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who had it may have removed the file meanwhile: then this lock is on nothing.
        busy = not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        busy = True
    except OSError:
        return
    if busy:
        file.seek(0)
        raise Busy(f"another build writes to {path.parent} ({file.read().strip() or 'it has just begun'}): wait for it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def continues(out: Path, options: dict) -> bool:
    """Whether an unfinished build with these very options lies in `out`."""
    try:
        return json.loads((out / WORK_NAME / OPTIONS_NAME).read_bytes()) == json.loads(json.dumps(options))
    except (OSError, ValueError):
        return False


def open_work(out: Path, options: dict) -> Path:
    """The directory for pieces, made if it is not there, with the options of the build that uses it."""
    # Absolute, since it is named to other processes.
    work = out.absolute() / WORK_NAME
    work.mkdir(parents=True, exist_ok=True)
    for partial in work.glob("*.partial"):
        partial.unlink()
    with replacing(work / OPTIONS_NAME) as file:
        file.write(json.dumps(options).encode())
    return work


def note_reading(work: Path, who: str, file: str) -> None:
    """Leaves word of what a process is reading, for the one who asks why it died. An empty file: nothing."""
    (work / f"reading-{who}").write_text(file)


def take_notes(work: Path) -> dict[str, str]:
    """{process: the file it was reading} of processes that did not finish; the notes are removed."""
    notes = {}
    for path in sorted(work.glob("reading-*")):
        if file := path.read_text():
            notes[path.name.removeprefix("reading-")] = file
        path.unlink()
    return notes
