"""From what was parsed to shards: which entries survive, which are held out, how far that separates, and the tars."""

import dataclasses
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path

from proteingpt.data import splits
from proteingpt.data.fetching import FetchError
from proteingpt.data.filters import ASKED_FOR, Filters, Skip, asked_steps, count_funnel
from proteingpt.data.pieces import Parsed, Stored, read_stored
from proteingpt.data.report import REPORT_NAME, SKIPPED_NAME, BuildReport, write_report, write_skipped
from proteingpt.data.shards import file_sha256, write_shards
from proteingpt.data.sources import Gathered, Sources
from proteingpt.data.splits import SplitError
from proteingpt.data.structure.fact_texts import is_day


class BuildError(ValueError):
    """A build that was refused, or that found nothing fit to be written."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Everything that decides the bytes of the shards, but for the sources themselves. Checked where it is made.

    split: paper, date, cluster or published (splits.py). test_fraction: share of the entries held out. test_from: ISO
    day, for split date. seed: draws the lots. samples_per_shard, shard_mb: a tar ends at whichever comes first.
    seconds_per_file: a file that takes longer is skipped, None: never; the largest of the archive take one or two
    minutes.
    """

    filters: Filters = Filters()
    split: str = "paper"
    test_fraction: float = 0.2
    test_from: str | None = None
    seed: int = 42
    samples_per_shard: int = 1000
    shard_mb: float | None = None
    seconds_per_file: float | None = 300.0

    def __post_init__(self):
        filters = self.filters
        if not filters.chain or filters.chain == "label:":
            raise BuildError(f"chain is {filters.chain!r}, wanted an author chain id, label:X, first or all")
        if filters.min_residues < 1:
            raise BuildError(f"min_residues is {filters.min_residues}, wanted at least 1")
        if filters.max_residues is not None and filters.max_residues < filters.min_residues:
            raise BuildError(f"max_residues {filters.max_residues} is less than min_residues {filters.min_residues}")
        if filters.max_resolution is not None and not filters.max_resolution > 0:
            raise BuildError(f"max_resolution is {filters.max_resolution}, wanted more than 0 angstrom")
        if self.split not in splits.SPLITS:
            raise BuildError(f"split is {self.split!r}, wanted one of {', '.join(splits.SPLITS)}")
        if not 0 <= self.test_fraction < 1:
            raise BuildError(f"test_fraction is {self.test_fraction}, wanted 0 <= test_fraction < 1")
        if self.test_from is not None and self.split != "date":
            raise BuildError(f"test_from goes with split date, not with {self.split}")
        if self.test_from is not None and not is_day(self.test_from):
            raise BuildError(f"test_from is {self.test_from!r}, wanted a day such as 2022-01-01")
        if self.samples_per_shard < 1:
            raise BuildError(f"samples_per_shard is {self.samples_per_shard}, wanted at least 1")
        if self.shard_mb is not None and not self.shard_mb > 0:
            raise BuildError(f"shard_mb is {self.shard_mb}, wanted more than 0")
        if self.seconds_per_file is not None and not 0 < self.seconds_per_file <= 86_400:
            raise BuildError(f"seconds_per_file is {self.seconds_per_file}, wanted more than 0 and at most 86400")


def check_split(sources: Sources, options: BuildOptions) -> None:
    """Raises BuildError where the split wants what is not there: before hours of work, not after."""
    try:
        if options.split == "published" and sources.dataset is None:
            raise SplitError("split published wants the published dataset.json: give --dataset FILE")
        if sources.clusters is not None:
            splits.read_clusters(sources.clusters)
        elif options.split == "cluster" and sources.rcsb is None:
            splits.require_mmseqs()
    except SplitError as error:
        raise BuildError(str(error)) from error


def write_build(
    outcomes: list[Parsed],
    gathered: Gathered,
    sources: Sources,
    options: BuildOptions,
    work: Path,
    report: BuildReport,
    max_failed_share: float | None,
) -> None:
    """Draws the split, writes the shards, skipped.tsv and report.json; counts all of it in `report`."""
    out = Path(report.out)
    entries = _count_outcomes(outcomes, gathered, options, report)
    report.funnel = _funnel(report, entries, options.filters)
    write_skipped(out / SKIPPED_NAME, report)
    _check_survivors(entries, report, max_failed_share)
    clusters, origin = _clusters(entries, gathered, sources, options, work)
    report.options["clusters_from"] = origin.name
    if origin.file is not None:
        report.options["source_sha256"] |= {"clusters": [file_sha256(origin.file)]}
    test = _draw_test(entries, gathered.sides, clusters, options)
    sides = {"train": [e for e in entries.values() if e.entry not in test]}
    sides["test"] = [e for e in entries.values() if e.entry in test]
    if not sides["train"]:
        raise BuildError(f"the {options.split} split of {len(entries)} entries leaves none to train on")
    manifest = write_shards(
        out,
        {split: (read_stored(work, sample) for sample in _in_order(found)) for split, found in sides.items()},
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=None if options.shard_mb is None else int(options.shard_mb * 1e6),
        options=report.options,
    )
    report.samples = {split: totals["num_samples"] for split, totals in manifest["totals"].items()}
    report.entries = {split: len(found) for split, found in sides.items()}
    report.leak = _measure_leak(sides, clusters)
    write_report(out / REPORT_NAME, report)


def _in_order(entries: list[Parsed]) -> list[Stored]:
    """The samples in the order of their members' names, which begin with key and dot."""
    return sorted((sample for entry in entries for sample in entry.samples), key=lambda sample: f"{sample.key}.")


def _count_outcomes(
    outcomes: list[Parsed], gathered: Gathered, options: BuildOptions, report: BuildReport
) -> dict[str, Parsed]:
    """{entry id: its outcome} of those that gave samples; the rest goes into the report."""
    entries: dict[str, Parsed] = {}
    report.num_entries = len(gathered.skips)
    report.skips, report.duplicates = list(gathered.skips), list(gathered.duplicates)
    for outcome in outcomes:
        report.duplicates += outcome.others
        if outcome.samples and outcome.entry in entries:
            # Two names, one id inside: the file names could not tell.
            detail = f"the entry is read from {entries[outcome.entry].file}"
            report.duplicates.append(Skip(outcome.file, outcome.entry, "", "duplicate", detail))
            continue
        report.num_entries += 1
        report.skips += outcome.skips
        if outcome.samples and options.split == "date" and outcome.date is None:
            detail = "neither release date nor year of deposition is known: give --facts, or split otherwise"
            report.skips.append(Skip(outcome.file, outcome.entry, "", "no date", detail))
        elif outcome.samples:
            entries[outcome.entry] = outcome
    for skips in (report.skips, report.duplicates):
        skips.sort(key=lambda skip: (skip.entry, skip.file))
    return entries


def _funnel(report: BuildReport, entries: Collection[str], filters: Filters) -> list[tuple[str, int]]:
    dropped: dict[tuple[str, str], list[str]] = {}
    for skip in report.skips:
        if skip.entry not in entries:
            dropped.setdefault((skip.entry, skip.file), []).append(skip.reason)
    return count_funnel(report.num_entries, dropped.values(), asked_steps(filters))


def _check_survivors(entries: Mapping[str, Parsed], report: BuildReport, max_failed_share: float | None) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.skipped_by_reason.items())
    where = f"see {Path(report.out) / SKIPPED_NAME}"
    if not entries:
        raise BuildError(f"none of {report.num_entries} entries gave a sample ({reasons}): {where}")
    failed = {(skip.entry, skip.file) for skip in report.skips if skip.reason not in ASKED_FOR}
    share = len(failed) / report.num_entries
    if max_failed_share is not None and share > max_failed_share:
        raise BuildError(
            f"{len(failed)} of {report.num_entries} entries failed ({share:.1%}), more than max_failed_share "
            f"{max_failed_share:.1%} ({reasons}): {where}; no shards were written"
        )


def _draw_test(
    entries: Mapping[str, Parsed],
    sides: Mapping[str, str] | None,
    clusters: Mapping[str, list[Hashable]] | None,
    options: BuildOptions,
) -> set[str]:
    """The entries held out."""
    try:
        if options.split == "paper":
            return splits.draw_test_entries(entries, options.test_fraction, options.seed)
        if options.split == "date":
            dates = {name: entry.date for name, entry in entries.items()}
            return splits.newest_entries(dates, options.test_fraction, options.test_from)
        if options.split == "cluster":
            of_entry = {name: {clusters[s.key] for s in entry.samples} for name, entry in entries.items()}
            flat = {name: frozenset().union(*found) for name, found in of_entry.items()}
            return splits.draw_test_clusters(flat, options.test_fraction, options.seed)
        return {name for name in entries if sides.get(name) == "test"}
    except SplitError as error:
        raise BuildError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where clusters come from. name: of the file, its address, or the program that made them; None without any."""

    name: str | None = None
    file: Path | None = None


def _clusters(
    entries: Mapping[str, Parsed], gathered: Gathered, sources: Sources, options: BuildOptions, work: Path
) -> tuple[dict[str, frozenset[Hashable]] | None, _Origin]:
    """{sample key: the clusters it is in}, and their origin; None where no clusters are known and none are needed.

    Where it is not known which entity a chain is of, it counts as being in the clusters of all entities of its entry:
    that may link too much, and never lets a near copy through. A chain that no cluster has is with its exact copies.
    """
    try:
        if sources.clusters is not None:
            origin = _Origin(sources.clusters.name, sources.clusters)
        elif options.split == "cluster" and sources.rcsb is not None:
            file = gathered.client.fetch_clusters(30)
            origin = _Origin(f"{gathered.client.addresses.clusters}/{file.name}", file)
        elif options.split == "cluster":
            return _mmseqs_clusters(entries, work), _Origin(splits.name_mmseqs())
        else:
            return None, _Origin()
        of_entity = splits.read_clusters(origin.file)
    except (SplitError, FetchError) as error:
        raise BuildError(str(error)) from error
    of_entry = splits.clusters_by_entry(of_entity)
    clusters = {
        sample.key: _clusters_of(entry.entry, sample, of_entity, of_entry)
        for entry in entries.values()
        for sample in entry.samples
    }
    return clusters, origin


def _clusters_of(
    entry: str, sample: Stored, of_entity: Mapping[str, int], of_entry: Mapping[str, set[int]]
) -> frozenset[Hashable]:
    if sample.entity is not None:
        found = of_entity.get(f"{entry.upper()}_{sample.entity}")
        return frozenset([sample.sequence if found is None else found])
    return frozenset(of_entry.get(entry) or [sample.sequence])


def _mmseqs_clusters(entries: Mapping[str, Parsed], work: Path) -> dict[str, frozenset[Hashable]]:
    samples = [sample for entry in entries.values() for sample in entry.samples]
    # Each sequence once, by its digest: the archive is full of copies.
    sequences = {s.sequence: read_stored(work, s).members["sequence.txt"].decode() for s in samples}
    found = splits.cluster_by_mmseqs(sequences)
    return {sample.key: frozenset([found.get(sample.sequence, sample.sequence)]) for sample in samples}


def _measure_leak(
    sides: Mapping[str, list[Parsed]], clusters: Mapping[str, frozenset[Hashable]] | None
) -> dict[str, float | int]:
    """How many test samples have a sequence, or share a cluster, with training; and their shares."""
    samples = {split: [s for entry in found for s in entry.samples] for split, found in sides.items()}
    num, share = splits.shared_share([s.sequence for s in samples["test"]], [s.sequence for s in samples["train"]])
    leak = {"num_test_sequences_in_train": num, "share_test_sequences_in_train": round(share, 6)}
    if clusters is not None:
        trained = frozenset().union(*(clusters[sample.key] for sample in samples["train"]))
        num = sum(bool(clusters[sample.key] & trained) for sample in samples["test"])
        share = num / len(samples["test"]) if samples["test"] else 0.0
        leak |= {"num_test_samples_in_train_clusters": num, "share_test_samples_in_train_clusters": round(share, 6)}
    return leak
