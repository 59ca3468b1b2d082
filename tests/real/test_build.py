"""Shards from real PDB entries, difficult ones among them: nothing is lost without a word, twice gives the same."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from proteingpt.data.build import build
from proteingpt.data.shards import ShardSet, file_sha256

REAL = Path(__file__).parents[3] / "shared" / "data" / "pdb"
TAGS = (
    "altloc chainA_incomplete_backbone chainA_no_backbone no_chain_A nucleic_only multi_method insertion_codes "
    "microheterogeneity noncanonical MSE negative_resnum multi_model EM other_method neutron chainA_lt10"
).split()
MAX_FILE_BYTES = 400_000

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data in {REAL} are absent")


def choose_entries() -> list[str]:
    """About 40 entries: the first four of each difficult tag, and the first four that exist in several formats."""
    with open(REAL / "manifest.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    rows = [row for row in rows if (REAL / row["file"]).stat().st_size < MAX_FILE_BYTES]
    chosen = []
    for tag in TAGS:
        chosen += [row["pdb_id"] for row in rows if tag in row["tags"].split(",")][:4]
    formats: dict[str, set[str]] = {}
    for row in rows:
        formats.setdefault(row["pdb_id"], set()).add(row["format"])
    chosen += [entry for entry, found in formats.items() if len(found) > 1][:4]
    return sorted(set(chosen))


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("structures")
    for entry in choose_entries():
        for path in REAL.glob(f"{entry}.*"):
            shutil.copy(path, directory / path.name)
    return directory


@pytest.fixture(scope="module")
def built(structures, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "real"
    return build(structures, out, samples_per_shard=10), out


def test_every_real_entry_is_a_sample_or_a_named_skip(built, structures):
    report, _ = built
    entries = {path.name.split(".")[0] for path in structures.iterdir()}
    assert report.num_files == len(list(structures.iterdir()))
    assert report.num_entries == len(entries) >= 25
    assert report.num_samples + len(report.skips) == report.num_entries
    assert report.num_entries + len(report.duplicates) == report.num_files
    assert report.num_samples >= 15 and len(report.skips) >= 2
    for skip in report.skips + report.duplicates:
        assert (structures / skip.file).is_file() and skip.reason and skip.detail
    # The faults of these files are known and none is ours.
    assert "reader failed" not in report.skipped_by_reason


def test_the_skips_are_those_the_tags_foretell(built):
    """An entry without a protein chain A, by the tags that others gave, cannot be a sample, and it is in the report."""
    report, out = built
    keys = {key for split in ("train", "test") for key in ShardSet(out, split).keys}
    with open(REAL / "manifest.tsv", newline="") as file:
        tags = {row["pdb_id"]: row["tags"] for row in csv.DictReader(file, delimiter="\t")}
    hopeless = {e for e in choose_entries() if {"nucleic_only", "no_chain_A"} & set(tags[e].split(","))}
    assert hopeless and hopeless <= {skip.entry for skip in report.skips}
    assert not {f"{entry}_A" for entry in hopeless} & keys


def test_the_real_shards_verify_and_hold_their_sources(built, structures):
    report, out = built
    for split, num_samples in report.samples.items():
        shard_set = ShardSet(out, split)
        shard_set.verify()
        assert len(shard_set) == num_samples
        for i in range(len(shard_set)):
            sample = shard_set.read(i)
            source = sample.metadata["source"]
            assert source["sha256"] == file_sha256(structures / source["file"])
            assert len(sample.turns) == shard_set.num_turns[i] >= 2 and sample.description.endswith(".")
        shard_set.close()
    assert report.entries["test"] == round(0.2 * report.num_samples)


def test_a_second_build_in_two_processes_gives_the_same_bytes(built, structures, tmp_path):
    _, out = built
    build(structures, tmp_path / "again", samples_per_shard=10, workers=2)
    names = sorted(path.name for path in out.iterdir() if path.name != "report.json")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
    assert len(json.loads((out / "manifest.json").read_text())["splits"]["train"]) >= 2
