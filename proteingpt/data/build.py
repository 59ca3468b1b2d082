"""From a directory of structure files to shards, with a report of everything that was set aside and why.

Entries are parsed one by one, in processes or MPI ranks if asked, and spooled to disk in the order of their names; the
split is drawn when all survivors are known, so it is exact and nothing but one entry at a time is held in memory. The
bytes of the shards depend on the files and the options alone, not on the number of processes. Given up: splitting by
sequence cluster; the report counts the test chains whose very sequence is trained on.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

from proteingpt.data.questions import closed_questions, describe
from proteingpt.data.shards import ShardError, check_key, existing_shards, file_sha256, replacing, write_shards
from proteingpt.data.structure import StructureError, find_structures, read_entry
from proteingpt.protein import Facts, Protein, Sample

STANDARD_LETTERS = frozenset("ACDEFGHIKLMNPQRSTVWY")

# Of several files of one entry the first kind is taken: BinaryCIF reads fastest, and entity counts are to be had from
# mmCIF rather than from the PDB format.
FORMAT_RANKS = {".bcif": 0, ".cif": 1, ".mmcif": 1, ".pdbx": 1, ".pdb": 2, ".ent": 2}

# Left out because the user asked for it; every other skip counts towards max_failed_share.
SIZE_REASONS = ("too short", "too long")

# Where each launcher says how many processes it started: Open MPI; MPICH, Intel MPI and PMI-2; MVAPICH; srun. The first
# that is set counts: under SLURM, mpirun starts its daemons by srun, whose own count is that of the nodes.
WORLD_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

SKIPPED_NAME = "skipped.tsv"
REPORT_NAME = "report.json"


class BuildError(ValueError):
    """A build that was refused, or that found nothing fit to be written."""


@dataclass(frozen=True)
class Skip:
    """Something set aside. file: relative to the structures; chain: as asked for, "" where it did not come to that."""

    file: str
    entry: str
    chain: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ReadOptions:
    """What is read of an entry, the same in every process."""

    root: Path
    chain: str
    min_residues: int
    max_residues: int | None


@dataclass(frozen=True)
class Outcome:
    """What one entry gave: samples, skips, or with several chains both."""

    file: str
    entry: str
    samples: tuple[Sample, ...] = ()
    skips: tuple[Skip, ...] = ()


@dataclass
class BuildReport:
    """What a build did. num_files = num_entries + duplicates; with one chain per entry num_entries = samples + skips.

    samples, entries: {split: count}. skips: everything set aside but duplicates; duplicates: further files of an entry
    already read. num_test_sequences_in_train: test samples whose very sequence is also trained on.
    """

    out: str
    structures: str
    options: dict
    num_files: int = 0
    num_entries: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    num_test_sequences_in_train: int = 0
    skips: list[Skip] = field(default_factory=list)
    duplicates: list[Skip] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_samples(self) -> int:
        return sum(self.samples.values())

    @property
    def skipped_by_reason(self) -> dict[str, int]:
        """Commonest first, then by name."""
        counts = Counter(skip.reason for skip in self.skips)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def build(
    structures: str | Path,
    out: str | Path,
    *,
    chain: str = "A",
    test_fraction: float = 0.2,
    seed: int = 42,
    samples_per_shard: int = 1000,
    min_residues: int = 1,
    max_residues: int | None = None,
    max_failed_share: float | None = None,
    overwrite: bool = False,
    workers: int = 1,
    progress: TextIO | None = None,
) -> BuildReport | None:
    """Reads every structure under `structures` and writes shards, `skipped.tsv` and `report.json` to `out`.

    chain: an author chain id, "label:X" for a label id, "first", or "all".
    test_fraction: exactly round(test_fraction * entries) of the entries that gave samples become the test split, drawn
    by a hash of (seed, entry id); all chains of an entry are on one side.
    max_failed_share: stop before writing shards when a larger share of the entries fails (0..1); None: never.
    workers: processes that parse. Under an MPI launcher, with workers = 1, rank r parses entries r, r + size, ... and
    rank 0 writes; the other ranks return None.
    Raises BuildError where the build is refused or leaves nothing to train on. Bad structures only become skips.
    """
    started = time.monotonic()
    structures, out = Path(structures), Path(out)
    options = ReadOptions(structures, chain, min_residues, max_residues)
    _check_options(options, test_fraction, samples_per_shard, workers, max_failed_share)
    _check_directories(structures, out, overwrite)
    comm = _mpi_world(os.environ)
    if comm is not None and workers > 1:
        raise BuildError(f"workers is {workers} under an MPI launcher: give more MPI ranks instead, and workers 1")
    files = find_structures(structures)
    paths, duplicates = choose_files(files, structures)
    if not paths:
        raise BuildError(f"no structure file in {structures}: wanted .cif, .bcif, .pdb or .ent, plain or .gz")
    recorded = {
        "chain": chain,
        "test_fraction": test_fraction,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "min_residues": min_residues,
        "max_residues": max_residues,
    }
    report = BuildReport(str(out), str(structures), recorded, num_files=len(files), duplicates=duplicates)
    outcomes = _outcomes(paths, options, workers) if comm is None else _mpi_outcomes(paths, options, comm)
    if comm is not None and comm.rank != 0:
        deque(outcomes, maxlen=0)
        return None
    try:
        _write_build(outcomes, len(paths), report, max_failed_share, progress)
    except OSError as error:
        # A full disk, most often. The other ranks may be waiting for rank 0 to take what they parsed.
        if comm is not None:
            print(f"cannot write to {out}: {error}", file=sys.stderr, flush=True)
            comm.Abort(1)
        raise
    report.seconds = round(time.monotonic() - started, 1)
    _write_report(out / REPORT_NAME, report)
    return report


def _write_build(
    outcomes: Iterable[Outcome],
    num_paths: int,
    report: BuildReport,
    max_failed_share: float | None,
    progress: TextIO | None,
) -> None:
    """Spools the outcomes, draws the split, writes the shards and skipped.tsv; counts all of it in `report`."""
    out, options = Path(report.out), report.options
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as spool:
        entries = _spool_outcomes(outcomes, num_paths, spool, report, progress)
        _write_skipped(out / SKIPPED_NAME, report)
        _check_survivors(entries, report, max_failed_share)
        offsets = _draw_sides(entries, options["test_fraction"], options["seed"])
        manifest = write_shards(
            out,
            {split: _unspool(spool, chunks) for split, chunks in offsets.items()},
            samples_per_shard=options["samples_per_shard"],
            options=options,
        )
        report.num_test_sequences_in_train = _count_shared_sequences(spool, offsets)
    report.samples = {split: totals["num_samples"] for split, totals in manifest["totals"].items()}
    report.entries = {split: len(chunks) for split, chunks in offsets.items()}


# --- which files ----------------------------------------------------------------------------------------------------


def entry_name(path: Path) -> tuple[str, int]:
    """Entry a file is of, by its name in lower case, and the rank of its format: `pdb1CBS.ent.gz` -> ("1cbs", 2)."""
    name = path.name.lower().removesuffix(".gz")
    stem, dot, extension = name.rpartition(".")
    if not dot:
        return name, max(FORMAT_RANKS.values())
    if extension == "ent":
        stem = stem.removeprefix("pdb")
    return stem, FORMAT_RANKS.get(f".{extension}", max(FORMAT_RANKS.values()))


def choose_files(files: Iterable[Path], root: Path) -> tuple[list[Path], list[Skip]]:
    """One file for each entry, sorted by entry: BinaryCIF before mmCIF before PDB, then by path. The rest as skips."""
    candidates: dict[str, list[tuple[int, Path]]] = {}
    for path in files:
        name, rank = entry_name(path)
        candidates.setdefault(name, []).append((rank, path))
    chosen, duplicates = [], []
    for name in sorted(candidates):
        (_, first), *others = sorted(candidates[name])
        chosen.append(first)
        taken = _relative(first, root)
        duplicates += [
            Skip(_relative(path, root), name, "", "duplicate", f"the entry is read from {taken}") for _, path in others
        ]
    return chosen, duplicates


def draw_test_entries(entries: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Exactly round(fraction * n) of the n entry ids: those with the smallest hash of (seed, id).

    By hash rather than by a shuffle, so that an entry added later moves few others to the other side.
    """
    entries = list(entries)

    def rank(name: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), name

    return set(sorted(entries, key=rank)[: round(fraction * len(entries))])


def _draw_sides(entries: Mapping[str, list[int]], fraction: float, seed: int) -> dict[str, list[list[int]]]:
    """{"train": ..., "test": ...}: for each entry of that side the spool offsets of its samples, in order."""
    test = draw_test_entries(entries, fraction, seed)
    if len(test) == len(entries):
        raise BuildError(f"test_fraction {fraction} of {len(entries)} entries leaves none to train on: lower it")
    return {
        "train": [offsets for name, offsets in entries.items() if name not in test],
        "test": [offsets for name, offsets in entries.items() if name in test],
    }


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


# --- one entry ------------------------------------------------------------------------------------------------------


def read_outcome(path: Path, options: ReadOptions) -> Outcome:
    """Everything one file gives. Never raises for what the file holds: that becomes a skip."""
    file, name = _relative(path, options.root), entry_name(path)[0]
    try:
        return _read_chains(path, file, options)
    except (StructureError, OSError) as error:
        return _nothing(file, name, "unreadable", _without_path(error, path))
    except Exception as error:
        # One file in a hundred thousand that our reader does not survive must not cost the build; it is named instead.
        return _nothing(file, name, "reader failed", f"{type(error).__name__}: {error}")


def _nothing(file: str, name: str, reason: str, detail: str) -> Outcome:
    return Outcome(file, name, skips=(Skip(file, name, "", reason, detail),))


def _without_path(error: Exception, path: Path) -> str:
    """The message without the path it begins with: the skip has it, and a moved directory gives the same report."""
    return str(error).removeprefix(f"{path}: ")


def _read_chains(path: Path, file: str, options: ReadOptions) -> Outcome:
    entry = read_entry(path)
    if not entry.chains:
        return _nothing(file, entry.id, "no protein chain", "no chain of the entry is a polypeptide")
    source = {"file": file, "sha256": file_sha256(path)}
    samples, skips = [], []
    for chain in wanted_chains(options.chain, entry.chains):
        try:
            protein = entry.protein(chain)
        except StructureError as error:
            known = chain in entry.chains or chain.startswith("label:")
            reason = "chain unusable" if known else "no such protein chain"
            skips.append(Skip(file, entry.id, chain, reason, _without_path(error, path)))
            continue
        refusal = refuse_protein(protein, options.min_residues, options.max_residues)
        if refusal:
            skips.append(Skip(file, entry.id, chain, *refusal))
        else:
            samples.append(make_sample(protein, entry.facts, source))
    return Outcome(file, entry.id, tuple(samples), tuple(skips))


def wanted_chains(chain: str, chains: Iterable[str]) -> list[str]:
    """The chains to read of an entry that has `chains`: all of them, the first, or the one that is named."""
    chains = list(chains)
    return {"all": chains, "first": chains[:1]}.get(chain, [chain])


def refuse_protein(protein: Protein, min_residues: int, max_residues: int | None) -> tuple[str, str] | None:
    """(reason, detail) where a chain is not fit to be a sample, else None."""
    length = len(protein)
    if not STANDARD_LETTERS & set(protein.sequence):
        return "no standard residue", f"none of the {length} residues is one of the twenty"
    if not protein.resolved.any():
        return "no backbone", f"none of the {length} residues has N, CA and C"
    if length < min_residues:
        return "too short", f"{length} residues, wanted at least {min_residues}"
    if max_residues is not None and length > max_residues:
        return "too long", f"{length} residues, wanted at most {max_residues}"
    try:
        check_key(protein.key)
    except ShardError as error:
        return "bad key", str(error)
    return None


def make_sample(protein: Protein, facts: Facts, source: Mapping[str, str]) -> Sample:
    """The sample of a chain. metadata: the facts of the entry, and the name and sha256 of the file they came from."""
    # Through JSON, so that a sample read back from a shard equals the one written: tuples become lists.
    metadata = json.loads(json.dumps({"facts": asdict(facts), "source": dict(source)}))
    return Sample(protein, describe(protein, facts), closed_questions(protein, facts), metadata)


# --- many entries ---------------------------------------------------------------------------------------------------


def _outcomes(paths: list[Path], options: ReadOptions, workers: int) -> Iterator[Outcome]:
    """The outcome of each path, in order, parsed here or in `workers` processes."""
    if workers == 1:
        yield from (read_outcome(path, options) for path in paths)
        return
    # Spawned, since a fork copies whatever threads and locks the caller holds.
    context = multiprocessing.get_context("spawn")
    running: deque[tuple[Path, Future]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for path in paths:
                running.append((path, pool.submit(read_outcome, path, options)))
                # A window, because results that wait for an earlier one stay in memory.
                if len(running) == 4 * workers:
                    yield running[0][1].result()
                    running.popleft()
            while running:
                yield running[0][1].result()
                running.popleft()
        except BrokenProcessPool as error:
            suspects = ", ".join(path.name for path, future in running if not future.done() or future.exception())
            raise BuildError(
                f"a parsing process died, most often for want of memory, on one of: {suspects}; "
                "give fewer workers, or set the file aside"
            ) from error


def world_size(environ: Mapping[str, str]) -> int:
    """Processes that an MPI launcher or srun says it started; 1 where none speaks."""
    sizes = (int(environ[name]) for name in WORLD_SIZE_VARIABLES if environ.get(name, "").isdigit())
    return next(sizes, 1)


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
    # No rank may look for shards in the output directory after rank 0 has begun to write them.
    comm.Barrier()
    return comm


def _mpi_outcomes(paths: list[Path], options: ReadOptions, comm) -> Iterator[Outcome]:
    """On rank 0 the outcome of each path, in order. Another rank parses every size-th path and sends it."""
    for number, path in enumerate(paths):
        owner = number % comm.size
        if comm.rank == owner:
            outcome = read_outcome(path, options)
            if owner != 0:
                comm.send(outcome, dest=0)
        elif comm.rank == 0:
            outcome = comm.recv(source=owner)
        if comm.rank == 0:
            yield outcome


def _spool_outcomes(
    outcomes: Iterable[Outcome], num_paths: int, spool: BinaryIO, report: BuildReport, progress: TextIO | None
) -> dict[str, list[int]]:
    """Writes each sample to the spool; returns {entry id: offsets of its samples}. Gathers the skips in the report."""
    entries: dict[str, list[int]] = {}
    files: dict[str, str] = {}
    meter = _Progress(num_paths, progress)
    for outcome in outcomes:
        if outcome.samples and outcome.entry in entries:
            # Two names, one id inside: the file names could not tell.
            detail = f"the entry is read from {files[outcome.entry]}"
            report.duplicates.append(Skip(outcome.file, outcome.entry, "", "duplicate", detail))
        else:
            report.num_entries += 1
            report.skips += outcome.skips
            if outcome.samples:
                files[outcome.entry] = outcome.file
                entries[outcome.entry] = [_spool_sample(spool, sample) for sample in outcome.samples]
        meter.advance(len(report.skips))
    meter.finish(len(report.skips))
    return entries


def _spool_sample(spool: BinaryIO, sample: Sample) -> int:
    offset = spool.tell()
    pickle.dump(sample, spool, protocol=5)
    return offset


def _unspool(spool: BinaryIO, entries: Iterable[list[int]]) -> Iterator[Sample]:
    for offsets in entries:
        for offset in offsets:
            spool.seek(offset)
            yield pickle.load(spool)


def _count_shared_sequences(spool: BinaryIO, offsets: Mapping[str, list[list[int]]]) -> int:
    """Test samples whose sequence is letter for letter one of the training sequences."""

    def digests(split: str) -> list[bytes]:
        samples = _unspool(spool, offsets[split])
        return [hashlib.sha256(sample.protein.sequence.encode()).digest() for sample in samples]

    trained = set(digests("train"))
    return sum(digest in trained for digest in digests("test"))


class _Progress:
    """A line on `stream`: entries done, rate, skips, time left. Rewritten in a terminal, now and then elsewhere."""

    def __init__(self, total: int, stream: TextIO | None):
        self.total, self.stream, self.done = total, stream, 0
        self.started = self.shown = time.monotonic()
        self.terminal = stream is not None and stream.isatty()

    def advance(self, num_skips: int) -> None:
        self.done += 1
        if self.stream is not None and time.monotonic() - self.shown >= (0.5 if self.terminal else 30):
            self._show(num_skips, "\r" if self.terminal else "\n")

    def finish(self, num_skips: int) -> None:
        if self.stream is not None:
            self._show(num_skips, "\n")

    def _show(self, num_skips: int, end: str) -> None:
        self.shown = time.monotonic()
        rate = self.done / max(self.shown - self.started, 1e-6)
        left = (self.total - self.done) / max(rate, 1e-6)
        line = f"{self.done}/{self.total} entries, {rate:.1f} entries/s, {num_skips} skipped, {left:.0f} s left"
        # Blanks wipe what a longer line left in the terminal.
        print(f"{line:<72}" if self.terminal else line, end=end, file=self.stream, flush=True)


# --- checks and reports ---------------------------------------------------------------------------------------------


def _check_options(
    options: ReadOptions, test_fraction: float, samples_per_shard: int, workers: int, max_failed_share: float | None
) -> None:
    if not options.chain or options.chain == "label:":
        raise BuildError(f"chain is {options.chain!r}, wanted an author chain id, label:X, first or all")
    if not 0 <= test_fraction < 1:
        raise BuildError(f"test_fraction is {test_fraction}, wanted 0 <= test_fraction < 1")
    if samples_per_shard < 1:
        raise BuildError(f"samples_per_shard is {samples_per_shard}, wanted at least 1")
    if workers < 1:
        raise BuildError(f"workers is {workers}, wanted at least 1")
    if options.min_residues < 1:
        raise BuildError(f"min_residues is {options.min_residues}, wanted at least 1")
    if options.max_residues is not None and options.max_residues < options.min_residues:
        raise BuildError(f"max_residues {options.max_residues} is less than min_residues {options.min_residues}")
    if max_failed_share is not None and not 0 <= max_failed_share <= 1:
        raise BuildError(f"max_failed_share is {max_failed_share}, wanted 0 to 1")


def _check_directories(structures: Path, out: Path, overwrite: bool) -> None:
    if not structures.is_dir():
        raise BuildError(f"no directory {structures}: --structures wants a directory of structure files")
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is not a directory: --out wants a directory for the shards")
    found = existing_shards(out)
    if found and not overwrite:
        raise BuildError(f"{out} already holds shards ({found[0].name}): give --overwrite, or another --out")


def _check_survivors(entries: Mapping[str, list[int]], report: BuildReport, max_failed_share: float | None) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.skipped_by_reason.items())
    where = f"see {Path(report.out) / SKIPPED_NAME}"
    if not entries:
        raise BuildError(f"none of {report.num_entries} entries gave a sample ({reasons}): {where}")
    failed = {skip.file for skip in report.skips if skip.reason not in SIZE_REASONS}
    share = len(failed) / report.num_entries
    if max_failed_share is not None and share > max_failed_share:
        raise BuildError(
            f"{len(failed)} of {report.num_entries} entries failed ({share:.1%}), more than max_failed_share "
            f"{max_failed_share:.1%} ({reasons}): {where}; no shards were written"
        )


def _write_skipped(path: Path, report: BuildReport) -> None:
    """A tab-separated table of skips, then duplicates, a header first. Tabs and newlines in a detail become blanks."""
    columns = ("file", "entry", "chain", "reason", "detail")
    rows = [columns] + [tuple(getattr(skip, name) for name in columns) for skip in report.skips + report.duplicates]
    with replacing(path) as file:
        file.writelines("\t".join(" ".join(cell.split()) for cell in row).encode() + b"\n" for row in rows)


def _write_report(path: Path, report: BuildReport) -> None:
    """The report without the long lists, which stand in skipped.tsv."""
    content = {name: value for name, value in vars(report).items() if name not in ("skips", "duplicates")}
    content |= {
        "num_samples": report.num_samples,
        "num_skipped": len(report.skips),
        "skipped": report.skipped_by_reason,
        "num_duplicates": len(report.duplicates),
    }
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def format_report(report: BuildReport) -> str:
    """What the command says at its end: the counts, where the shards are, and what to type next."""
    lines = [
        f"{report.num_files} structure files, {report.num_entries} entries, {report.num_samples} samples, "
        f"{len(report.skips)} skipped, {len(report.duplicates)} duplicate files, {report.seconds:.1f} s"
    ]
    lines += [f"  skipped, {reason}: {count}" for reason, count in report.skipped_by_reason.items()]
    lines += [
        f"  {split}: {count} samples of {report.entries[split]} entries" for split, count in report.samples.items()
    ]
    if report.num_test_sequences_in_train:
        lines.append(
            f"  note: {report.num_test_sequences_in_train} test samples have a sequence that is also trained on"
        )
    if report.skips or report.duplicates:
        lines.append(f"every skip with its file and reason: {Path(report.out) / SKIPPED_NAME}")
    lines += [
        f"shards: {report.out}",
        "next: deepspeed launch/train.py --ds_config ds_configs/zero2.json --recipe paper-align --data " + report.out,
    ]
    return "\n".join(lines)
