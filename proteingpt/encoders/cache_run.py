"""Writes an embedding cache: every process takes the next data shard when it is free, and writes the rows of its
proteins.

The processes may be ranks of one launch, tasks of a SLURM array or commands started by hand, at any time and on any
node that sees the directory: they know of each other by claims (claims.py), and none waits for another but at the very
end. A shard is made aside and comes to its place by one rename, which only the first can do; so a process that dies
costs the shard it was at, which another takes over, and two that do the same shard cost time. Given up: going on within
a shard.
"""

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from proteingpt.config import EncodersConfig
from proteingpt.data.shard_format import totals_of
from proteingpt.data.shards import MANIFEST_NAME, ShardSet, existing_shards, replacing
from proteingpt.distributed import on_first_rank
from proteingpt.encoders.cache import FORMAT, FORMAT_VERSION, CacheError, identity
from proteingpt.encoders.cache_plan import Job, jobs_of
from proteingpt.encoders.cache_shard import RECORD_NAME, Published, write_shard
from proteingpt.encoders.claims import POLL_SECONDS, Claim, Claims
from proteingpt.encoders.pair import Encoders
from proteingpt.encoders.rows_file import PARTS
from proteingpt.encoders.weights import ESM_IF1_NAME

# what an unfinished cache keeps: settings, a directory for each shard that is done or in the making
WORK_NAME = ".work"
CLAIMS_NAME = ".claims"
SETTINGS_NAME = "settings.json"
LINE_EVERY_SECONDS = 5.0
MIN_FREE_BYTES = 2**20  # for indexes and manifest


# ------------------------------------------------------------------------------------------- what is to be written


def open_splits(data: str | Path) -> list[ShardSet]:
    """All splits of the data, train first."""
    train = ShardSet(data, "train")
    return [train, *(ShardSet(data, split) for split in train.manifest["splits"] if split != "train")]


def settings_of(splits: Sequence[ShardSet], encoders, config: EncodersConfig, together: bool) -> dict:
    """The manifest but for what was written: all that decides the bytes."""
    sources = {"structure": config.esm_if1, "sequence": config.esm2}
    published = isinstance(encoders, Published)
    described = {
        part: identity(getattr(encoders, part), ESM_IF1_NAME if published else sources[part]) for part in PARTS
    }
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
    """Of all splits, the largest first, so that none is left to one process at the end."""
    jobs = []
    for shards in splits:
        lengths, numbers = shards.num_residues.tolist(), shards.shard_numbers.tolist()
        jobs += jobs_of(shards.split, shards.keys, lengths, numbers, widths, dtype)
    return sorted(jobs, key=lambda job: (-job.num_residues, job.name))


# ---------------------------------------------------------------------------------------------------- the directory


def read_json(path: Path) -> dict | None:
    return json.loads(path.read_bytes()) if path.is_file() else None


def begin(out: Path, settings: dict, overwrite: bool) -> bool:
    """Makes the directory ready; False where the cache is finished already. Raises CacheError where it holds others.

    overwrite: others are removed. What is of the same settings has the same bytes, and is kept.
    """
    work = out / WORK_NAME
    for path in (out / MANIFEST_NAME, work / SETTINGS_NAME):
        found = read_json(path)
        other = [name for name, value in settings.items() if found is not None and found.get(name) != value]
        if other and overwrite:
            remove(out)
        elif other:
            what = "; ".join(f"{name}: {found.get(name)!r}, wanted {settings[name]!r}" for name in other)
            raise CacheError(f"{out} holds others ({what}): give another --out, or --overwrite")
        elif found is not None and path.name == MANIFEST_NAME:
            shutil.rmtree(work, ignore_errors=True)  # of one that was killed at its very end
            return False
    if not work.is_dir() and existing_shards(out):
        raise CacheError(f"{out} holds shards that are no embeddings of ours: give another --out")
    work.mkdir(parents=True, exist_ok=True)
    with replacing(work / SETTINGS_NAME) as file:
        file.write(json.dumps(settings, indent=1).encode() + b"\n")
    return True


def remove(out: Path) -> None:
    """The embeddings in `out`, the manifest first. CacheError where something else lies there, or somebody writes
    there."""
    manifest = read_json(out / MANIFEST_NAME)
    if manifest and manifest.get("format") != FORMAT:
        raise CacheError(f"{out} holds data shards, which --overwrite will not remove: give another --out")
    claims = Claims(out / CLAIMS_NAME).owners()
    for name in (claims.keys() - {"begin"}) if (out / WORK_NAME).is_dir() else ():
        owner = f"process {claims[name].get('pid')} on {claims[name].get('host')}"
        raise CacheError(
            f"{owner} writes {name} of other embeddings to {out}: wait for it, or, if you know it dead, remove "
            f"{out / CLAIMS_NAME}"
        )
    for path in sorted(existing_shards(out), key=lambda path: path.name != MANIFEST_NAME):
        path.unlink()
    shutil.rmtree(out / WORK_NAME, ignore_errors=True)


def done_names(out: Path) -> set[str]:
    """Of the jobs that are done. CacheError where an unfinished cache has been removed under our feet."""
    try:
        return {path.name for path in (out / WORK_NAME).iterdir() if path.suffix != ".making" and path.is_dir()}
    except FileNotFoundError:
        raise CacheError(
            f"{out / WORK_NAME} vanished: somebody has removed the unfinished embeddings in {out}"
        ) from None


def check_space(out: Path, jobs: Sequence[Job]) -> None:
    """CacheError where the disk is too small for the jobs, of which some may be half written."""
    in_the_making = sum(map(bytes_of, (out / WORK_NAME).glob("*.making/*")))
    needed, free = sum(job.num_bytes for job in jobs) - in_the_making + MIN_FREE_BYTES, shutil.disk_usage(out).free
    if needed > free:
        raise CacheError(
            f"{out} has {free:,} bytes free, the embeddings still to be written take {needed:,} ({needed / 1e9:.1f} "
            "GB): make room, give an --out elsewhere, or let the encoders run with the training"
        )


def bytes_of(path: Path) -> int:
    """0 of a file that is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def do_job(out: Path, job: Job, claim: Claim, shards: ShardSet, encoders, dtype: str, together: bool, tell) -> None:
    """Writes a shard aside and moves it to its place, with its record, which makes it done."""
    work = out / WORK_NAME
    for left_behind in work.glob(f"{job.name}.*.making"):
        shutil.rmtree(left_behind, ignore_errors=True)
    scratch = work / f"{job.name}.{socket.gethostname()}-{os.getpid()}.making"
    try:
        scratch.mkdir()
        write_shard(scratch, job, shards, encoders, dtype, together, tell)
        scratch.rename(work / job.name)  # refused where it is there already
    except OSError:
        if claim.is_ours and not (work / job.name).is_dir():
            raise  # else another process has taken this one for dead, and it is that one's job
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def finish(out: Path, settings: dict, jobs: Sequence[Job]) -> dict:
    """Moves the shards to where readers look for them and writes the manifest, last. Goes on where it was killed."""
    splits, left_out = {split: [] for split in settings["data"]}, {}
    for job in sorted(jobs, key=lambda job: job.name):
        made = out / WORK_NAME / job.name
        record = json.loads((made / RECORD_NAME).read_bytes())
        left_out |= record["left_out"]
        if record["shard"]:
            splits[job.split].append(record["shard"])
            for name in (record["shard"]["file"], record["shard"]["index_file"]):
                if (made / name).is_file():
                    (made / name).replace(out / name)
            if bytes_of(out / record["shard"]["file"]) != record["shard"]["num_bytes"]:
                shutil.rmtree(made)
                raise CacheError(
                    f"{job.name} in {out} has lost bytes since it was written: start the same command again"
                )
    totals = {split: totals_of(shards) for split, shards in splits.items()}
    manifest = {**settings, "left_out": left_out, "totals": totals, "splits": splits}
    with replacing(out / MANIFEST_NAME) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    shutil.rmtree(out / WORK_NAME, ignore_errors=True)
    return manifest


# ----------------------------------------------------------------------------------------------------- all processes


class Progress:
    """The line of rank 0: how much of the cache is done, by all processes, how fast, how long it still takes."""

    def __init__(self, out: Path, jobs: Sequence[Job], claims: Claims, file: TextIO | None):
        self.out, self.jobs, self.claims, self.file = out, {job.name: job for job in jobs}, claims, file
        self.num_residues, self.num_bytes = (sum(job[place] for job in jobs) for place in (-2, -1))
        self.began, self.shown, self.at_first = time.monotonic(), 0.0, self.counts()[1] if file else 0

    def counts(self) -> tuple[int, int]:
        """(jobs done, residues done)."""
        try:
            done = done_names(self.out) & self.jobs.keys()
        except CacheError:  # another process has finished
            done = set(self.jobs)
        half = sum(o.get("done", 0) for name, o in self.claims.owners().items() if name in self.jobs.keys() - done)
        return len(done), sum(self.jobs[name].num_residues for name in done) + half

    def show(self) -> None:
        now = time.monotonic()
        if self.file is None or now - self.shown < LINE_EVERY_SECONDS:
            return
        self.shown = now
        self.write(*self.counts(), "\r" if self.file.isatty() else "\n")

    def end(self) -> None:
        if self.file:
            self.write(len(self.jobs), self.num_residues, "\n")

    def write(self, jobs: int, residues: int, end: str) -> None:
        passed = residues - self.at_first, time.monotonic() - self.began
        line = progress_line(jobs, residues, len(self.jobs), self.num_residues, self.num_bytes, *passed)
        print(f"\x1b[2K{line}" if self.file.isatty() else line, end=end, file=self.file, flush=True)


def progress_line(
    jobs: int, residues: int, num_jobs: int, num_residues: int, num_bytes: int, passed: int, seconds: float
) -> str:
    """jobs, residues: done so far. passed: residues, by all processes, in `seconds`."""
    rate = passed / seconds if seconds else 0.0
    left = f"{(num_residues - residues) / rate / 60:,.1f} min left" if rate else "measuring"
    share = residues / num_residues if num_residues else 1.0
    return (
        f"{jobs}/{num_jobs} shards  {share:.1%} of {num_residues:,} residues  {share * num_bytes / 1e9:.2f} of "
        f"{num_bytes / 1e9:.2f} GB  {rate:,.0f} residues/s  {left}"
    )


def cache_embeddings(
    data: str | Path,
    out: str | Path,
    config: EncodersConfig,
    device,
    *,
    together: bool = False,
    published: str | Path | None = None,
    overwrite: bool = False,
    progress: TextIO | None = None,
) -> dict | None:
    """Writes the rows of all proteins of `data` to `out`, with all other processes that do. The manifest, once all is
    there; None where it was there before.

    together: several proteins in a forward, faster, with rows equal but for rounding to those of training's own
    encoders.
    published: a folder of `.pt` files to take the rows from. Raises CacheError, what ShardSet and Encoders raise, and
    OSError where the disk gives out; what is finished is kept then.
    """
    out, splits = Path(out), open_splits(data)
    encoders = Published(published, config.dtype) if published else Encoders.load(config, device)
    settings = settings_of(splits, encoders, config, together)
    jobs = all_jobs(splits, {part: getattr(encoders, part).width for part in PARTS}, config.dtype)
    by_split, claims = {shards.split: shards for shards in splits}, Claims(out / CLAIMS_NAME)

    def start() -> bool:
        out.mkdir(parents=True, exist_ok=True)
        with claims.turn("begin"):
            if not begin(out, settings, overwrite):
                claims.clear()
                return False
            done = done_names(out)
        pending = [job for job in jobs if job.name not in done]
        if progress:
            total, still = (sum(job.num_bytes for job in some) for some in (jobs, pending))
            there = "" if total == still else f", of which {total - still:,} are there already"
            print(f"{out}: {total:,} bytes in {len(jobs)} shards{there}", file=progress, flush=True)
        check_space(out, pending)
        return True

    def work(job: Job, claim, count: list[int]) -> None:
        def tell(num_residues: int):
            count[0] += num_residues
            line.show()

        do_job(out, job, claim, by_split[job.split], encoders, config.dtype, together, tell)

    if not on_first_rank(start):
        return None
    line = Progress(out, jobs, claims, progress)
    manifest = work_off(out, settings, jobs, claims, work, line.show)
    line.end()
    return manifest


def work_off(out: Path, settings: dict, jobs: Sequence[Job], claims: Claims, work, show) -> dict:
    """Takes one job after the other until all are done, those of dead processes too; then one process finishes."""
    while (manifest := read_json(out / MANIFEST_NAME)) is None:
        try:
            took = take_one(out, settings, jobs, claims, work)
        except (CacheError, OSError):
            if not (out / MANIFEST_NAME).is_file():  # else another process has just finished, and tidied up
                raise
            continue
        show()
        if not took:
            time.sleep(POLL_SECONDS)
    claims.clear()
    return manifest


def take_one(out: Path, settings: dict, jobs: Sequence[Job], claims: Claims, work) -> bool:
    """Does a job that nobody is at, or finishes where all are done; whether there was such. After a claim it is looked
    again: another may have done the work meanwhile, and let go."""
    done = done_names(out)
    pending = [job for job in jobs if job.name not in done]
    if not pending:
        with claims.claim("manifest") as claim:
            if claim and not (out / MANIFEST_NAME).is_file():
                finish(out, settings, jobs)
            return claim is not None
    for job in pending:
        count = [0]
        with claims.claim(job.name, lambda: count[0]) as claim:
            if claim and not (out / WORK_NAME / job.name).is_dir():
                work(job, claim, count)
            if claim:
                return True
    return False
