"""Which entries are held out for testing: by lot as in the paper, by date, by sequence cluster, or as published.

All of them are pure functions of entry ids, a seed, and what is known of the entries; chains of one entry are always
on one side. Given up: exact shares where whole clusters must stay together.
"""

import hashlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

from proteingpt.data.annotations import parse_clusters

SPLITS = ("paper", "date", "cluster", "published")
# Every sequence is searched for among all, and what is found is linked: at least 30 % identity in an alignment that
# chance would give once in a thousand searches. `mmseqs easy-cluster` as RCSB runs it wants 90 % of both sequences in
# the alignment, and so parts a domain from the protein that contains it, however alike they are.
MMSEQS_OPTIONS = ("--min-seq-id", "0.3", "-e", "0.001", "-s", "7.5", "--max-seqs", "1000")
MMSEQS_COLUMNS = ("query", "target", "qcov", "tcov")
# Of the shorter of two sequences at least so much must lie in the alignment.
MIN_COVERAGE = 0.5


class SplitError(ValueError):
    """A split that cannot be made as asked."""


def num_test_entries(num_entries: int, fraction: float) -> int:
    """Entries to hold out: all but the floor of (1 - fraction) * n, and never the last one.

    That is how 132,092 became the published 105,673 / 26,419; rounding would give 26,418. Exact in decimal: 0.2 of 5
    is 1, whatever binary floats make of it.
    """
    share = Fraction(str(fraction))
    return min(num_entries - math.floor((1 - share) * num_entries), max(num_entries - 1, 0))


def _lot(seed: int, name: str) -> tuple[bytes, str]:
    """By hash rather than by a shuffle, so that an entry added later moves few others to the other side."""
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), name


def draw_test_entries(entries: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The `paper` split: exactly num_test_entries of the ids, those with the smallest hash of (seed, id)."""
    entries = list(entries)
    return set(sorted(entries, key=lambda name: _lot(seed, name))[: num_test_entries(len(entries), fraction)])


def newest_entries(dates: Mapping[str, str], fraction: float, test_from: str | None = None) -> set[str]:
    """The `date` split: entries of test_from (ISO day) and later, or without it the newest share; ties go by id.

    dates: {entry: ISO day, or a year alone, which counts as before all of its days}.
    """
    if test_from is not None:
        return {name for name, date in dates.items() if date >= test_from}
    newest_first = sorted(dates, key=lambda name: (dates[name], name), reverse=True)
    return set(newest_first[: num_test_entries(len(dates), fraction)])


def draw_test_clusters(clusters: Mapping[str, Collection[Hashable]], fraction: float, seed: int) -> set[str]:
    """The `cluster` split: whole groups of entries that share no cluster with the rest, as many as fit the share.

    clusters: {entry: the clusters its chains are in}. Entries linked by clusters, directly or over others, form a
    group. Groups are tried in the order of a lot and taken where they fit. Raises SplitError where none fits.
    """
    wanted = num_test_entries(len(clusters), fraction)
    test: set[str] = set()
    for group in sorted(_linked(clusters), key=lambda group: _lot(seed, group[0])):
        if len(test) + len(group) <= wanted:
            test.update(group)
    if wanted and not test:
        raise SplitError(
            f"no group of entries that share clusters is as small as {wanted}, the share asked for of "
            f"{len(clusters)} entries: raise test_fraction, or split otherwise"
        )
    return test


def _linked(clusters: Mapping[str, Collection[Hashable]]) -> list[list[str]]:
    """Groups of entries, each sorted, that are connected by common clusters."""
    first_of: dict[Hashable, str] = {}
    pairs = ((name, first_of.setdefault(cluster, name)) for name, own in clusters.items() for cluster in own)
    groups: dict[str, list[str]] = {}
    for name, group in connect(sorted(clusters), pairs).items():
        groups.setdefault(group, []).append(name)
    return list(groups.values())


def connect(names: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{name: its group, called by one of its members}: groups of names that pairs link, directly or over others."""
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for one, other in pairs:
        parent[root(one)] = root(other)
    return {name: root(name) for name in parent}


# --- where clusters come from


def read_clusters(path: str | Path) -> dict[str, int]:
    """{`1ABC_1` (entry, entity): number of its cluster} of RCSB's cluster file, one cluster each line.

    Raises SplitError where it is not such a file.
    """
    try:
        with open(path, encoding="utf-8") as lines:
            clusters = parse_clusters(lines)
    except (OSError, ValueError) as error:
        raise SplitError(f"{path}: cannot be read as a cluster file: {error}") from error
    if not clusters:
        raise SplitError(f"{path}: no cluster in it, wanted one each line, as in `1ABC_1 2DEF_1`")
    return clusters


def clusters_by_entry(clusters: Mapping[str, int]) -> dict[str, set[int]]:
    """{entry in lower case: the clusters of all its entities}."""
    found: dict[str, set[int]] = {}
    for member, cluster in clusters.items():
        found.setdefault(member.rpartition("_")[0].lower(), set()).add(cluster)
    return found


def require_mmseqs(program: str = "mmseqs") -> None:
    """Raises SplitError where it is not installed, with what to do."""
    if shutil.which(program) is None:
        raise SplitError(
            "split cluster wants clusters: give --clusters FILE (RCSB's clusters-by-entity-30.txt), "
            "or install MMseqs2 (mmseqs on PATH; Debian's package mmseqs2)"
        )


def name_mmseqs(program: str = "mmseqs") -> str:
    """The program with its version and what it is asked, so that its clusters can be had again."""
    version = subprocess.run([program, "version"], capture_output=True, text=True).stdout.strip()
    return " ".join(("MMseqs2", version, "easy-search", *MMSEQS_OPTIONS, f"coverage {MIN_COVERAGE}"))


def cluster_by_mmseqs(sequences: Mapping[str, str], program: str = "mmseqs") -> dict[str, str]:
    """{name: cluster} for {name: sequence}, by the MMseqs2 on PATH: no two clusters hold sequences of 30 % identity.

    That is over at least MIN_COVERAGE of the shorter one, and as far as MMseqs2 finds it: its search needs k-mers, so
    that a peptide of less than some 15 residues may be alone. Raises SplitError where it is not installed or fails.
    """
    require_mmseqs(program)
    with tempfile.TemporaryDirectory() as scratch:
        fasta, found = Path(scratch, "in.fasta"), Path(scratch, "found.tsv")
        fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
        command = [program, "easy-search", fasta, fasta, found, Path(scratch, "tmp"), *MMSEQS_OPTIONS]
        command += ["--format-output", ",".join(MMSEQS_COLUMNS)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            raise SplitError(f"mmseqs easy-search ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
        with open(found) as lines:
            return connect(sequences, read_mmseqs(lines))


def read_mmseqs(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs that cover MIN_COVERAGE of the shorter sequence, of a table of MMSEQS_COLUMNS."""
    for line in lines:
        query, target, of_query, of_target = line.rstrip("\n").split("\t")
        if max(float(of_query), float(of_target)) >= MIN_COVERAGE:
            yield query, target


# --- how well a split separates


def shared_share(test: Iterable[Hashable], train: Iterable[Hashable]) -> tuple[int, float]:
    """How many of `test` occur in `train`, and their share (0 of none)."""
    test, train = list(test), set(train)
    num_shared = sum(item in train for item in test)
    return num_shared, num_shared / len(test) if test else 0.0
