"""Writes an embedding cache: each rank takes the next data shard when it is free, and writes the rows of its proteins.

Who takes what is one counter in the ranks' store, so there are no claims that a killed run could leave behind: what is done
is what lies in the directory. A killed run that is started again does the shards that are missing, and ends with the same
bytes; what it loses is the shards that were being written, one for each rank. Given up: going on within a shard.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import torch

from proteingpt.config import EncodersConfig
from proteingpt.data.published import embedding_files, read_embedding
from proteingpt.data.shard_format import totals_of
from proteingpt.data.shards import MANIFEST_NAME, EncodedSample, ShardError, ShardSet, existing_shards, replacing, write_shards
from proteingpt.distributed import Rank, on_first_rank
from proteingpt.encoders import packed
from proteingpt.encoders.ahead import one_ahead
from proteingpt.encoders.cache import FORMAT, FORMAT_VERSION, MEMBER, CachedPart, CacheError, identity
from proteingpt.encoders.cache_plan import Job, jobs_of
from proteingpt.encoders.pair import Encoders, NoEncoder, Rows
from proteingpt.encoders.rows_file import PARTS, encode_rows, inputs_sha256
from proteingpt.encoders.weights import ESM_IF1_NAME
from proteingpt.protein import ENCODER_EXTRA_ROWS, Protein

WORK_NAME = ".work"  # what an unfinished cache keeps: settings, records of shards that are done, shards in the making
SETTINGS_NAME = "settings.json"
LINE_EVERY_SECONDS = 5.0
# Of ranks that wait for the last shards of others, which may take long.
POLL_SECONDS = 0.2
MIN_FREE_BYTES = 2**20  # for indexes and manifest


class Published:
    """Rows of ESM-IF1 that were published as `.pt` files, in the place of encoders: structure only, weights unknown."""

    def __init__(self, folder: str | Path, dtype: str):
        self.files, self.dtype = embedding_files(folder), getattr(torch, dtype)
        self.structure, self.sequence = CachedPart(ESM_IF1_NAME, 512, ""), NoEncoder("cpu")

    def encode(self, proteins: Sequence[Protein]) -> Rows:
        """ValueError where there is no file of a protein, or one of another length."""
        rows = [self._read(protein) for protein in proteins]
        return rows, [torch.zeros(0, 0) for _ in proteins]

    def _read(self, protein: Protein) -> torch.Tensor:
        if protein.id not in self.files:
            raise ValueError(f"no published embedding {protein.id}.pt")
        rows = read_embedding(self.files[protein.id])
        if len(rows) != len(protein) + ENCODER_EXTRA_ROWS:
            wanted = f"the sample of {len(protein)} residues wants {len(protein) + ENCODER_EXTRA_ROWS}"
            raise ValueError(f"{self.files[protein.id].name} has {len(rows)} rows, {wanted}: unresolved residues were dropped")
        return torch.from_numpy(rows).to(self.dtype)


# ------------------------------------------------------------------------------------------- what is to be written


def open_splits(data: str | Path) -> list[ShardSet]:
    """All splits of the data, train first."""
    train = ShardSet(data, "train")
    return [train, *(ShardSet(data, split) for split in train.manifest["splits"] if split != "train")]


def settings_of(splits: Sequence[ShardSet], encoders, config: EncodersConfig, together: bool) -> dict:
    """The manifest but for what was written: all that decides the bytes."""
    sources = {"structure": config.esm_if1, "sequence": config.esm2}
    published = isinstance(encoders, Published)
    described = {part: identity(getattr(encoders, part), ESM_IF1_NAME if published else sources[part]) for part in PARTS}
    if published:
        described["structure"]["sha256"] = None
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "data": {shards.split: shards.fingerprint for shards in splits},
        "encoders": described,
        "dtype": config.dtype,
        "backend": config.backend,
        "together": together,
    }


def all_jobs(splits: Sequence[ShardSet], widths: Mapping[str, int], dtype: str) -> list[Job]:
    """Of all splits, the largest first, so that none is left to one rank at the end."""
    jobs = []
    for shards in splits:
        lengths, numbers = shards.num_residues.tolist(), shards.shard_numbers.tolist()
        jobs += jobs_of(shards.split, shards.keys, lengths, numbers, widths, dtype)
    return sorted(jobs, key=lambda job: (-job.num_residues, job.name))


def begin(out: Path, settings: dict, overwrite: bool) -> bool:
    """Makes the directory ready; False where the cache is finished already. Raises CacheError where it holds others."""
    if overwrite and out.is_dir():
        remove(out)
    work = out / WORK_NAME
    for path in (out / MANIFEST_NAME, work / SETTINGS_NAME):
        if path.is_file():
            found = json.loads(path.read_bytes())
            other = [name for name, value in settings.items() if found.get(name) != value]
            if other:
                what = "; ".join(f"{name}: {found.get(name)!r}, wanted {settings[name]!r}" for name in other)
                raise CacheError(f"{out} holds others ({what}): give another --out, or --overwrite")
            if path.name == MANIFEST_NAME:
                shutil.rmtree(work, ignore_errors=True)  # a run that was killed at its very end
                return False
    if not work.is_dir() and existing_shards(out):
        raise CacheError(f"{out} holds shards that are no embeddings of ours: give another --out")
    work.mkdir(parents=True, exist_ok=True)
    for scratch in work.glob("*.making"):
        shutil.rmtree(scratch)
    with replacing(work / SETTINGS_NAME) as file:
        file.write(json.dumps(settings, indent=1).encode() + b"\n")
    return True


def remove(out: Path) -> None:
    """The embeddings in `out`, the manifest first. CacheError where something else lies there."""
    manifest = out / MANIFEST_NAME
    if manifest.is_file() and json.loads(manifest.read_bytes()).get("format") != FORMAT:
        raise CacheError(f"{out} holds data shards, which --overwrite will not remove: give another --out")
    for path in sorted(existing_shards(out), key=lambda path: path.name != MANIFEST_NAME):
        path.unlink()
    shutil.rmtree(out / WORK_NAME, ignore_errors=True)


def record_of(out: Path, job: Job) -> dict | None:
    """What a finished job wrote, None where it is still to be done."""
    path = out / WORK_NAME / f"{job.name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_bytes())
    shard = record["shard"]
    # A power cut may have kept the record and lost what it speaks of.
    whole = shard is None or all((out / shard[name]).is_file() for name in ("file", "index_file"))
    return record if whole and (shard is None or (out / shard["file"]).stat().st_size == shard["num_bytes"]) else None


def check_space(out: Path, jobs: Sequence[Job]) -> None:
    needed, free = sum(job.num_bytes for job in jobs) + MIN_FREE_BYTES, shutil.disk_usage(out).free
    if needed > free:
        raise CacheError(
            f"{out} has {free:,} bytes free, the embeddings still to be written take {needed:,} ({needed / 1e9:.1f} GB): "
            "make room, give an --out elsewhere, or let the encoders run with the training"
        )


# ------------------------------------------------------------------------------------------------------- one shard


def rows_on_host(rows: Rows) -> tuple[Rows, "torch.cuda.Event | None"]:
    """The rows on their way to the CPU, and when they are there; None where they are."""
    on_gpu = any(part and part[0].is_cuda for part in rows)
    moved = tuple([r.to("cpu", non_blocking=on_gpu) for r in part] for part in rows)
    event = torch.cuda.Event() if on_gpu else None
    if event:
        event.record()
    return moved, event


def entries(shards: ShardSet, job: Job, encoders, dtype: str, together: bool, left_out: dict, tell) -> Iterator[EncodedSample]:
    """The job's proteins as members, in order; one that cannot be read or encoded goes to left_out with the reason.

    tell(number of residues): after each forward. The next forward has begun when one's rows are written.
    """
    lengths = (shards.num_residues[job.first : job.last] + ENCODER_EXTRA_ROWS).tolist()
    forwards = packed.packs(lengths, packed.MAX_ROWS) if together else ([i] for i in range(len(lengths)))

    def encode(numbers: list[int]):
        proteins = [p for p in (read(job.first + i) for i in numbers) if p]
        try:
            return proteins, rows_on_host((encoders.encode_together if together else encoders.encode)(proteins))
        except ValueError as error:
            if len(proteins) == 1:
                left_out[proteins[0].key] = str(error)
                return [], (([], []), None)
            return again_alone(proteins)

    def again_alone(proteins: list[Protein]):
        found = [encode_one(protein) for protein in proteins]
        good = [(protein, rows) for protein, rows in zip(proteins, found) if rows]
        rows = tuple([rows[part][0] for _, rows in good] for part in (0, 1))
        return [protein for protein, _ in good], rows_on_host(rows)

    def encode_one(protein: Protein) -> Rows | None:
        try:
            return encoders.encode([protein])
        except ValueError as error:
            left_out[protein.key] = str(error)
            return None

    def read(number: int) -> Protein | None:
        try:
            return shards.read_protein(number)
        except ShardError as error:
            left_out[shards.keys[number]] = str(error)
            return None

    for numbers, (proteins, (rows, there)) in one_ahead(forwards, encode):
        if there:
            there.synchronize()
        for protein, *both in zip(proteins, *rows, strict=True):
            if not all(part.isfinite().all() for part in both):
                left_out[protein.key] = f"rows that are not finite in {dtype}: cache them in another --dtype"
                continue
            data = encode_rows(protein.key, inputs_sha256(protein), *both, dtype)
            yield EncodedSample(protein.key, len(protein), 0, {MEMBER: data})
        tell(sum(lengths[i] - ENCODER_EXTRA_ROWS for i in numbers))


def do_job(out: Path, job: Job, shards: ShardSet, encoders, dtype: str, together: bool, tell) -> None:
    """Writes a shard aside, moves it to its place, and then its record, which is what makes it done."""
    scratch, left_out = out / WORK_NAME / f"{job.name}.making", {}
    shutil.rmtree(scratch, ignore_errors=True)
    samples = entries(shards, job, encoders, dtype, together, left_out, tell)
    written = write_shards(scratch, {job.split: samples}, samples_per_shard=None, options={})["splits"][job.split]
    shard = None
    if written:
        (shard,) = written
        for name, ending in (("file", ".tar"), ("index_file", ".index.jsonl")):
            os.replace(scratch / shard[name], out / f"{job.name}{ending}")
            shard[name] = f"{job.name}{ending}"
    with replacing(out / WORK_NAME / f"{job.name}.json") as file:
        file.write(json.dumps({"shard": shard, "left_out": left_out}).encode())
    shutil.rmtree(scratch)


def finish(out: Path, settings: dict, jobs: Sequence[Job]) -> dict:
    """Writes the manifest, last, and returns it."""
    records = {job.name: record_of(out, job) for job in sorted(jobs, key=lambda job: job.name)}
    lost = [name for name, record in records.items() if record is None]
    if lost:
        raise CacheError(f"{', '.join(lost)} in {out} vanished while the cache was made: start the same command again")
    splits = {split: [] for split in settings["data"]}
    for job in sorted(jobs, key=lambda job: job.name):
        if records[job.name]["shard"]:
            splits[job.split].append(records[job.name]["shard"])
    left_out = {key: why for record in records.values() for key, why in record["left_out"].items()}
    totals = {split: totals_of(shards) for split, shards in splits.items()}
    manifest = {**settings, "left_out": left_out, "totals": totals, "splits": splits}
    with replacing(out / MANIFEST_NAME) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    shutil.rmtree(out / WORK_NAME)
    return manifest


# ------------------------------------------------------------------------------------------------------- all ranks


class Board:
    """What the ranks share while they work: counters in the store that joined them. No collective waits on a slow rank."""

    numbers = itertools.count()  # of a process, the same on every rank, so that each board begins at zero

    def __init__(self):
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        self.store = PrefixStore(f"cache_embeddings/{next(self.numbers)}", _get_default_store())

    def next_job(self) -> int:
        return self.store.add("taken", 1) - 1

    def tell(self, num_residues: int) -> None:
        self.store.add("residues", num_residues)

    def end_job(self) -> None:
        self.store.add("done", 1)

    def fail(self, message: str) -> None:
        self.store.set("error", message)
        self.store.add("failed", 1)

    def counts(self) -> tuple[int, int]:
        """(jobs done, residues done). CacheError on every other rank once one has failed."""
        if self.store.add("failed", 0):
            raise CacheError(f"another rank has failed: {self.store.get('error').decode()}")
        return self.store.add("done", 0), self.store.add("residues", 0)


class Progress:
    """The line of rank 0: how much is done, how fast, how long it still takes."""

    def __init__(self, jobs: Sequence[Job], board: Board, file: TextIO | None):
        self.num_jobs, self.num_residues = len(jobs), sum(job.num_residues for job in jobs)
        self.num_bytes = sum(job.num_bytes for job in jobs)
        self.board, self.file, self.began, self.shown = board, file, time.monotonic(), 0.0

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        if self.file is None or not last and now - self.shown < LINE_EVERY_SECONDS:
            return
        self.shown = now
        line = progress_line(*self.board.counts(), self.num_jobs, self.num_residues, self.num_bytes, now - self.began)
        on_terminal = self.file.isatty()
        print(f"\x1b[2K{line}" if on_terminal else line, end="\r" if on_terminal and not last else "\n", file=self.file, flush=True)


def progress_line(jobs: int, residues: int, num_jobs: int, num_residues: int, num_bytes: int, seconds: float) -> str:
    """jobs, residues: done so far, in `seconds`."""
    rate = residues / seconds if seconds else 0.0
    left = f"{(num_residues - residues) / rate / 60:,.1f} min left" if rate else "measuring"
    share = residues / num_residues if num_residues else 1.0
    return (
        f"{jobs}/{num_jobs} shards  {share:.1%} of {num_residues:,} residues  {share * num_bytes / 1e9:.2f} of "
        f"{num_bytes / 1e9:.2f} GB  {rate:,.0f} residues/s  {left}"
    )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """For rank 0 of a run. CacheError where another run writes there. The system lets go when the process ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CacheError(f"another run writes to {out}: wait for it, or give another --out") from error
        yield
        (out / ".lock").unlink()


def cache_embeddings(
    data: str | Path,
    out: str | Path,
    config: EncodersConfig,
    rank: Rank,
    device,
    *,
    together: bool = False,
    published: str | Path | None = None,
    overwrite: bool = False,
    progress: TextIO | None = None,
) -> dict | None:
    """Writes the rows of all proteins of `data` to `out`, over all ranks, which have joined. The manifest, on every rank;
    None where the cache was finished already.

    together: several proteins in a forward, faster, with rows equal but for rounding to those of training's own encoders.
    published: a folder of `.pt` files to take the rows from. Raises CacheError and what ShardSet and Encoders raise.
    """
    out, splits = Path(out), open_splits(data)
    encoders = Published(published, config.dtype) if published else Encoders.load(config, device)
    settings = settings_of(splits, encoders, config, together)
    widths = {part: getattr(encoders, part).width for part in PARTS}
    jobs = all_jobs(splits, widths, config.dtype)

    def start() -> list[str] | None:
        if not begin(out, settings, overwrite):
            return None
        pending = [job for job in jobs if record_of(out, job) is None]
        if progress:
            total, still = (sum(job.num_bytes for job in some) for some in (jobs, pending))
            done = "" if total == still else f", of which {total - still:,} are there already"
            print(f"{out}: {total:,} bytes in {len(jobs)} shards{done}", file=progress, flush=True)
        check_space(out, pending)
        return [job.name for job in pending]

    with contextlib.ExitStack() as held:
        on_first_rank(lambda: held.enter_context(locked(out)))
        names = on_first_rank(start)
        if names is None:
            return None
        pending = [job for job in jobs if job.name in set(names)]
        work_off(out, pending, splits, encoders, config.dtype, together, progress if rank.is_first else None)
        return on_first_rank(lambda: finish(out, settings, jobs))


def work_off(out: Path, jobs: Sequence[Job], splits, encoders, dtype: str, together: bool, progress: TextIO | None) -> None:
    """Takes one job after the other until none is left, and waits for those of the other ranks."""
    board, by_split = Board(), {shards.split: shards for shards in splits}
    line = Progress(jobs, board, progress)

    def tell(num_residues: int):
        board.tell(num_residues)
        line.show()

    try:
        while (number := board.next_job()) < len(jobs):
            board.counts()
            do_job(out, jobs[number], by_split[jobs[number].split], encoders, dtype, together, tell)
            board.end_job()
    except CacheError:
        raise
    except BaseException as error:
        board.fail(f"{type(error).__name__}: {error}")
        raise
    while board.counts()[0] < len(jobs):
        line.show()
        time.sleep(POLL_SECONDS)
    line.show(last=True)
