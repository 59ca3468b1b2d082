"""From structure files to shards, with a report of everything that was set aside and why.

In this order: gather files and texts, parse what no earlier start of the build has parsed, draw the split, write. Files
are handed out in small batches, largest first, to MPI ranks or local processes or none; each worker keeps what it
parsed in a piece on disk (pieces.py), so a build that was killed goes on where it was, and the bytes of the shards
depend on the files and the options alone. Given up: parsing while files are still being fetched.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TextIO

from proteingpt.data.annotations import AnnotationError
from proteingpt.data.assemble import BuildError, BuildOptions, check_split, write_build
from proteingpt.data.crew import Crew, cut_batches
from proteingpt.data.entries import encode_outcome, read_outcome
from proteingpt.data.fetching import FetchError
from proteingpt.data.filters import Filters
from proteingpt.data.open_questions import OpenQuestionsError
from proteingpt.data.pieces import (
    WORK_NAME,
    Busy,
    Parsed,
    continues,
    holding,
    job_key,
    load_pieces,
    note_reading,
    open_work,
    take_notes,
    write_piece,
)
from proteingpt.data.published import PublishedDataError
from proteingpt.data.report import BuildReport, Progress, format_report
from proteingpt.data.shards import existing_shards, file_sha256, load_tar_writer
from proteingpt.data.sources import Job, SourceError, Sources, gather
from proteingpt.data.structure import StructureError

__all__ = ["BuildError", "BuildReport", "build", "format_report"]

# The sources whose presence the manifest records.
NAMED_SOURCES = ("structures", "facts", "abstracts", "qa", "dataset", "clusters", "embeddings", "rcsb", "alphafold")
SOURCE_ERRORS = (
    SourceError, FetchError, AnnotationError, PublishedDataError, OpenQuestionsError, StructureError
)  # fmt: skip

# Where each launcher says how many processes it started, and which one this is: Open MPI; MPICH, Intel MPI and PMI-2;
# MVAPICH; srun. The first that is set counts: under SLURM, mpirun starts its daemons by srun, whose own count is that
# of the nodes.
WORLD_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def build(
    structures: str | Path | None,
    out: str | Path,
    *,
    max_failed_share: float | None = None,
    overwrite: bool = False,
    workers: int = 1,
    progress: TextIO | None = None,
    **settings,
) -> BuildReport | None:
    """Reads every structure and writes shards, `skipped.tsv` and `report.json` to `out`.

    settings: fields of Sources, Filters and BuildOptions by name.
    max_failed_share: stop before writing shards when a larger share of the entries fails (0..1); None: never.
    workers: processes that parse. Under an MPI launcher, with workers = 1, every rank parses, rank 0 writes as well,
    and the others return None; `out` must be visible to all of them.
    The report's leak: test samples whose very sequence is trained on, and, where clusters are known, test samples that
    share a cluster with training: num_* and share_*.
    Raises BuildError where the build is refused or leaves nothing to train on. Bad structures only become skips. What
    was parsed by a build that ended early is kept in `out`/.build, and the same call goes on from there.
    """
    started = time.monotonic()
    sources, options = _take_settings(structures, settings)
    if workers < 1:
        raise BuildError(f"workers is {workers}, wanted at least 1")
    if max_failed_share is not None and not 0 <= max_failed_share <= 1:
        raise BuildError(f"max_failed_share is {max_failed_share}, wanted 0 to 1")
    out = Path(out)
    with _crew(workers) as crew:
        if crew is None:
            return None
        recorded = _recorded(options, sources)
        check_split(sources, options)
        with _holding(out):
            _check_out(out, recorded, overwrite)
            report = _build(sources, options, BuildReport(str(out), recorded), max_failed_share, crew, progress)
            _remove_work(out)
    report.seconds = round(time.monotonic() - started, 1)
    return report


@contextlib.contextmanager
def _holding(out: Path) -> Iterator[None]:
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is not a directory: --out wants a directory for the shards")
    try:
        with holding(out):
            yield
    except Busy as error:
        raise BuildError(str(error)) from error


def _build(
    sources: Sources,
    options: BuildOptions,
    report: BuildReport,
    max_failed_share: float | None,
    crew: Crew,
    progress: TextIO | None,
) -> BuildReport:
    """The build in a directory that is ours: gathers, parses, writes. Returns `report`, filled."""
    try:
        gathered = gather(sources, options.filters.require_abstract, progress)
    except SOURCE_ERRORS as error:
        raise BuildError(str(error)) from error
    if not gathered.jobs and not gathered.skips:
        where = sources.structures or "the sources"
        raise BuildError(f"no structure file in {where}: wanted .cif, .bcif, .pdb or .ent, plain or .gz")
    work = open_work(Path(report.out), report.options)
    report.num_files = gathered.num_files
    outcomes = _parse(gathered.jobs, options, work, crew, report, progress)
    write_build(outcomes, gathered, sources, options, work, report, max_failed_share)
    return report


def _take_settings(structures: str | Path | None, settings: Mapping) -> tuple[Sources, BuildOptions]:
    """Sorts the settings by the dataclass that has a field of that name."""
    settings = dict(settings, structures=None if structures is None else Path(structures))
    taken = {}
    for kind in (Sources, Filters, BuildOptions):
        names = {field.name for field in dataclasses.fields(kind)} - {"filters"}
        taken[kind] = {name: settings.pop(name) for name in names & set(settings)}
    if settings:
        raise TypeError(f"build() has no setting {', '.join(settings)}")
    sources = Sources(**taken[Sources])
    if not (sources.structures or sources.rcsb or sources.alphafold or sources.embeddings):
        raise BuildError("no source: give --structures, --rcsb, --alphafold or --embeddings")
    return sources, BuildOptions(Filters(**taken[Filters]), **taken[BuildOptions])


def _recorded(options: BuildOptions, sources: Sources) -> dict:
    """The options as the manifest keeps them. Of the sources only which there were: paths would tie it to a machine."""
    flat = dataclasses.asdict(options)
    filters = flat.pop("filters")
    given = [name for name in NAMED_SOURCES if getattr(sources, name)]
    flat |= {"released_until": sources.released_until, "sources": given, "source_sha256": _checksums(sources)}
    return {**filters, "methods": list(filters["methods"]), **flat}


def _checksums(sources: Sources) -> dict[str, list[str]]:
    """{name: sha256 of each} of the sources that are a file: what else decides the bytes, each structure apart, whose
    sha256 is in its sample."""
    files = {name: [getattr(sources, name)] for name in ("abstracts", "dataset", "clusters") if getattr(sources, name)}
    files["qa"] = sources.qa
    found = {name: [file_sha256(path) for path in paths if path.is_file()] for name, paths in files.items()}
    return {name: checksums for name, checksums in found.items() if checksums}


def _check_out(out: Path, recorded: dict, overwrite: bool) -> None:
    shutil.rmtree(out / f"{WORK_NAME}.done", ignore_errors=True)
    found = existing_shards(out)
    if found and not overwrite and not continues(out, recorded):
        raise BuildError(f"{out} already holds shards ({found[0].name}): give --overwrite, or another --out")


def _remove_work(out: Path) -> None:
    """Renamed first, so that a kill meanwhile leaves a finished build, not one with half of its pieces."""
    done = out / f"{WORK_NAME}.done"
    os.replace(out / WORK_NAME, done)
    shutil.rmtree(done)


# --- many entries ---------------------------------------------------------------------------------------------------


def parse_batch(
    batch: list[tuple[str, Job]], filters: Filters, work: Path, seconds_per_file: float | None = None
) -> list[Parsed]:
    """Parses (key, job) pairs, keeps their samples as a piece in `work`, and returns what there is of each."""
    who, outcomes = _who(os.environ), []
    try:
        for key, job in batch:
            note_reading(work, who, job.file)
            outcome = read_outcome(job, filters, seconds_per_file)
            outcomes.append(encode_outcome(key, outcome, job.text.entities))
        return write_piece(work, outcomes)
    finally:
        # A full disk or Ctrl-C is no fault of the file: only a process that died leaves its note.
        note_reading(work, who, "")


def _who(environ: Mapping[str, str]) -> str:
    """This process by name: its rank if it has one, host and process id."""
    size_name, rank_name = _world_variables(environ)
    rank = f"rank-{environ.get(rank_name, '?')}-" if size_name else ""
    return f"{rank}{socket.gethostname()}-process-{os.getpid()}"


def _parse(
    jobs: list[Job], options: BuildOptions, work: Path, crew: Crew, report: BuildReport, progress: TextIO | None
) -> list[Parsed]:
    """The outcome of each job, in order: from an earlier start, or parsed by the crew."""
    keys = [job_key(job, options.filters) for job in jobs]
    found = load_pieces(work, keys)
    report.num_continued = len(found)
    meter = Progress(len(jobs), progress, num_done=len(found))
    if found:
        meter.say(f"going on with an unfinished build: {len(found)} of {len(jobs)} entries are read")
    for who, file in take_notes(work).items():
        meter.say(f"that build ended while {who} was reading {file}: if it happens again, set the file aside")
    batches = cut_batches([(key, job) for key, job in zip(keys, jobs) if key not in found])
    call = partial(parse_batch, filters=options.filters, work=work, seconds_per_file=options.seconds_per_file)
    try:
        for outcomes in crew.run(call, batches, first=load_tar_writer):
            found |= {outcome.key: outcome for outcome in outcomes}
            meter.advance(len(outcomes), sum(len(outcome.skips) for outcome in outcomes))
    except BrokenProcessPool as error:
        raise BuildError(_name_dead(work, crew)) from error
    meter.finish()
    return [found[key] for key in keys]


def _name_dead(work: Path, crew: Crew) -> str:
    """Which process died, of what, and on which file; all files in work where that cannot be told."""
    notes = take_notes(work)
    dead = {process.pid: process.exitcode for process in crew.find_dead()}
    readers = {who: file for who, file in notes.items() if int(who.rpartition("-")[2]) in dead} or notes
    codes = ", ".join(f"process {pid} ended with {code}" for pid, code in dead.items()) or "a process died"
    files = ", ".join(sorted(readers.values())) or "a file"
    return (
        f"a parsing process died while reading {files} ({codes}), most often for want of memory: start again to go on "
        "from here, with fewer workers; or set the file aside"
    )


@contextlib.contextmanager
def _crew(workers: int) -> Iterator[Crew | None]:
    """The crew of this run. None on the MPI ranks that are not 0, when all work is done."""
    comm = _mpi_world(os.environ)
    if comm is not None and workers > 1:
        raise BuildError(f"workers is {workers} under an MPI launcher: give more MPI ranks instead, and workers 1")
    if comm is not None:
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor(comm, root=0) as executor:
            yield None if executor is None else Crew(executor, comm.size - 1, here=True)
    elif workers > 1:
        # Spawned, since a fork copies whatever threads and locks the caller holds.
        # Ctrl-C reaches them too: they finish what they read, and this process says that it was interrupted.
        deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), **deaf) as executor:
            yield Crew(executor, workers, here=False)
    else:
        yield Crew(None, 0, here=True)


def _world_variables(environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The names of the variables in which the launcher says size and rank, or None where there is one process."""
    for size, rank in WORLD_VARIABLES:
        if environ.get(size):
            return (size, rank) if int(environ[size]) > 1 else (None, None)
    return None, None


def world_size(environ: Mapping[str, str]) -> int:
    """How many processes a launcher started, by what it left in the environment; 1 without a launcher."""
    name, _ = _world_variables(environ)
    return int(environ[name]) if name else 1


def _mpi_world(environ: Mapping[str, str]):
    """The MPI communicator of all ranks, or None in a process of its own. mpi4py is imported only if there are ranks.

    Raises BuildError where the launcher and MPI disagree: each rank would then build everything for itself.
    """
    size = world_size(environ)
    if size == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BuildError(
            f"{size} processes were started by an MPI launcher, but mpi4py finds no MPI library ({error}): "
            "load one, or start one process with --workers"
        ) from error
    comm = MPI.COMM_WORLD
    if comm.size != size:
        raise BuildError(
            f"the launcher started {size} processes but MPI sees {comm.size}: start them with the mpirun of the "
            "library that mpi4py loads, under SLURM with srun --mpi=pmix, or start one process with --workers"
        )
    return comm
