"""Which entries are held out for testing: by lot as in the paper, by date, by sequence cluster, or as published.

All of them are pure functions of entry ids, a seed, and what is known of the entries; chains of one entry are always
on one side. Given up: exact shares where whole clusters must stay together.
"""

import hashlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Hashable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path

from proteingpt.data.annotations import parse_clusters

SPLITS = ("paper", "date", "cluster", "published")
# As RCSB clusters its sequences at 30 %: connected components, so that no member of one cluster is that near to one of
# another, as far as MMseqs2 finds it.
MMSEQS_OPTIONS = ("--min-seq-id", "0.3", "-c", "0.9", "-s", "8", "--max-seqs", "1000", "--cluster-mode", "1")


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
    parent = {name: name for name in clusters}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first_of: dict[Hashable, str] = {}
    for name, own in clusters.items():
        for cluster in own:
            parent[root(name)] = root(first_of.setdefault(cluster, name))
    groups: dict[str, list[str]] = {}
    for name in sorted(clusters):
        groups.setdefault(root(name), []).append(name)
    return list(groups.values())


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


def cluster_by_mmseqs(sequences: Mapping[str, str], program: str = "mmseqs") -> dict[str, str]:
    """{name: cluster} for {name: sequence}, at 30 % identity, by the MMseqs2 on PATH.

    Raises SplitError where it is not installed or fails.
    """
    if shutil.which(program) is None:
        raise SplitError(
            "split cluster wants clusters: give --clusters FILE (RCSB's clusters-by-entity-30.txt), "
            "or install MMseqs2 (mmseqs on PATH)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        fasta, prefix = Path(scratch, "in.fasta"), Path(scratch, "out")
        fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
        command = [program, "easy-cluster", str(fasta), str(prefix), str(Path(scratch, "tmp")), *MMSEQS_OPTIONS]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SplitError(f"mmseqs easy-cluster ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
        return read_mmseqs(Path(f"{prefix}_cluster.tsv"))


def read_mmseqs(path: Path) -> dict[str, str]:
    """{member: representative} of MMseqs2's `_cluster.tsv`: representative, tab, member on each line."""
    pairs = (line.split("\t") for line in path.read_text().splitlines())
    return {member: representative for representative, member in pairs}


# --- how well a split separates


def shared_share(test: Iterable[Hashable], train: Iterable[Hashable]) -> tuple[int, float]:
    """How many of `test` occur in `train`, and their share (0 of none)."""
    test, train = list(test), set(train)
    num_shared = sum(item in train for item in test)
    return num_shared, num_shared / len(test) if test else 0.0
