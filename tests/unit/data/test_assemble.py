"""From entries to shards: which are held out, how far that separates, the funnel, and what the manifest says of it."""

import json
import shutil
from hashlib import sha256

import pytest
from entry_files import BAD, annotation, cif_text, pdb_text, skipped_rows, write_files

from proteingpt.data.build import BuildError, build, format_report
from proteingpt.data.shards import ShardError, ShardSet, find_faults
from proteingpt.data.splits import name_mmseqs


def test_all_chains_of_an_entry_are_on_one_side(tmp_path):
    files = {f"{n}abc.pdb": pdb_text(f"{n}abc", {"A": "ACD", "a": "GGGG", "B": "MK"}) for n in range(1, 6)}
    structures = write_files(tmp_path / "structures", files)
    report = build(structures, tmp_path / "out", chain="all", test_fraction=0.4)
    sides = {split: ShardSet(tmp_path / "out", split).keys for split in ("train", "test")}
    assert report.entries == {"train": 3, "test": 2} and report.samples == {"train": 9, "test": 6}
    entries = {split: {key.split("_")[0] for key in keys} for split, keys in sides.items()}
    assert not entries["train"] & entries["test"]
    assert all([f"{entry}_A", f"{entry}_B", f"{entry}_a"] == keys for entry, keys in by_entry(sides["train"]).items())
    # All five hold the same three sequences: the report must say that the split separates nothing.
    assert report.leak == {"num_test_sequences_in_train": 6, "share_test_sequences_in_train": 1.0}
    assert "6 test samples (100.0%)" in format_report(report)


def by_entry(keys: list[str]) -> dict[str, list[str]]:
    entries: dict[str, list[str]] = {}
    for key in keys:
        entries.setdefault(key.split("_")[0], []).append(key)
    return entries


def test_without_any_date_the_date_split_says_what_to_give(tmp_path):
    structures = write_files(tmp_path / "structures", {f"{n}abc.cif": cif_text(f"{n}abc", "ACD") for n in (1, 2)})
    with pytest.raises(BuildError, match=r"none of 2 entries gave a sample \(no date 2\)"):
        build(structures, tmp_path / "out", split="date")
    assert "give --facts" in skipped_rows(tmp_path / "out")[1][4]


def test_the_date_split_holds_out_what_was_released_last(structures, tmp_path):
    days = {"1abc": "2003-01-01", "2abc": "2009-01-01", "3abc": "2001-01-01", "4abc": "2008-12-31"}
    facts = {f"{name}.json": annotation(name, day, {}) for name, day in days.items()}
    facts = write_files(tmp_path / "facts", facts)
    # 5abc has no release date: its year of deposition, 1994, stands in.
    build(structures, tmp_path / "share", facts=facts, split="date", test_fraction=0.4)
    assert ShardSet(tmp_path / "share", "test").keys == ["2abc_A", "4abc_A"]
    build(structures, tmp_path / "day", facts=facts, split="date", test_from="2009-01-01")
    assert ShardSet(tmp_path / "day", "test").keys == ["2abc_A"]
    manifest = json.loads((tmp_path / "day" / "manifest.json").read_text())
    assert manifest["options"]["split"] == "date" and manifest["options"]["test_from"] == "2009-01-01"


def test_the_cluster_split_keeps_clusters_whole_and_the_report_measures_the_others(structures, tmp_path):
    clusters = tmp_path / "clusters.txt"
    clusters.write_text("1ABC_1 2ABC_1 9XYZ_1\n3ABC_1\n4ABC_2 5ABC_1\n3ABC_2 5ABC_2\n")
    facts = {f"{n}abc.json": annotation(f"{n}abc", "2001-01-01", {"A": "2" if n == 4 else "1"}) for n in range(1, 6)}
    facts = write_files(tmp_path / "facts", facts)
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        report = build(structures, out, facts=facts, split="cluster", clusters=clusters, test_fraction=0.4, seed=seed)
        test = set(ShardSet(out, "test").keys)
        assert test in ({"1abc_A", "2abc_A"}, {"4abc_A", "5abc_A"}, {"3abc_A"})
        assert report.leak["num_test_samples_in_train_clusters"] == 0
    # Without the chain's entity, all clusters of an entry count: 3 and 5 are linked by their second ones.
    report = build(structures, tmp_path / "careful", split="cluster", clusters=clusters, test_fraction=0.4, seed=1)
    assert ShardSet(tmp_path / "careful", "test").keys == ["1abc_A", "2abc_A"]
    assert report.options["clusters_from"] == "clusters.txt"
    assert report.options["source_sha256"] == {"clusters": [sha256(clusters.read_bytes()).hexdigest()]}
    lots = build(structures, tmp_path / "lots", facts=facts, clusters=clusters, test_fraction=0.2, seed=0)
    (key,) = ShardSet(tmp_path / "lots", "test").keys
    alone = key == "3abc_A"
    assert lots.leak["share_test_samples_in_train_clusters"] == (0.0 if alone else 1.0)


@pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed (Debian: mmseqs2)")
def test_a_split_by_mmseqs_says_which_one_made_the_clusters(tmp_path):
    """Three copies, of which one on the other side would be a leak, and two sequences like no other."""
    copy, alone, other = "ACDEFGKMWA" * 6, "WMKGFEDCAA" * 6, "KKGDWAFECM" * 6
    entries = {"1abc": copy, "2abc": copy, "3abc": copy, "4abc": alone, "5abc": other}
    structures = write_files(tmp_path / "in", {f"{name}.cif": cif_text(name, s) for name, s in entries.items()})
    report = build(structures, tmp_path / "out", split="cluster", test_fraction=0.4)
    assert not {"1abc_A", "2abc_A", "3abc_A"} & set(ShardSet(tmp_path / "out", "test").keys)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["options"]["clusters_from"] == report.options["clusters_from"] == name_mmseqs()


def test_the_published_split_is_kept_and_the_unlisted_fall(structures, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"train": ["1abc", "2abc"], "test": ["4abc"]}))
    report = build(structures, tmp_path / "out", split="published", dataset=tmp_path / "dataset.json")
    assert ShardSet(tmp_path / "out", "train").keys == ["1abc_A", "2abc_A"]
    assert ShardSet(tmp_path / "out", "test").keys == ["4abc_A"]
    assert report.skipped_by_reason["not in the split"] == 8
    with pytest.raises(BuildError, match="give --dataset FILE"):
        build(structures, tmp_path / "none", split="published")
    assert not (tmp_path / "none").exists(), "it was parsed before the refusal"


def test_filters_that_are_asked_for_stand_in_the_funnel(structures, tmp_path):
    files = {"7nmr.pdb": pdb_text("7nmr", {"A": "ACX"}).replace("X-RAY DIFFRACTION", "SOLUTION NMR")}
    write_files(structures, files)
    wanted = dict(standard_letters_only=True, methods=("X-RAY", "em"), max_resolution=2.0, max_residues=10)
    report = build(structures, tmp_path / "out", **wanted, test_fraction=0)
    assert report.funnel == [
        ("entries", 12),
        ("is readable", 10),
        ("has the wanted chain", 9),
        ("has a backbone", 7),
        ("no non-coding letters", 6),
        ("wanted method", 5),
        ("wanted resolution", 5),
        ("wanted length", 4),
    ]
    assert report.num_samples == 4


def test_shards_end_at_the_size_asked_for(structures, tmp_path):
    """Each sample takes about 6 kB in the tar."""
    build(structures, tmp_path / "out", shard_mb=0.016, test_fraction=0)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    sizes = [shard["num_samples"] for shard in manifest["splits"]["train"]]
    assert sizes == [2, 2, 1] and find_faults(tmp_path / "out") == []


def test_the_manifest_has_the_checksums_of_the_files_that_texts_and_split_came_from(structures, tmp_path):
    abstracts, qa = tmp_path / "abstract.json", tmp_path / "qa.json"
    abstracts.write_text(json.dumps([{"pdb_id": "1abc", "caption": "We solved it."}]))
    qa.write_text(json.dumps({"1abc": [{"Q": "Why?", "A": "So."}]}))
    report = build(structures, tmp_path / "out", abstracts=abstracts, qa=[qa])
    wanted = {"abstracts": [sha256(abstracts.read_bytes()).hexdigest()], "qa": [sha256(qa.read_bytes()).hexdigest()]}
    options = json.loads((tmp_path / "out/manifest.json").read_text())["options"]
    assert options == report.options and options["source_sha256"] == wanted and options["released_until"] is None


def test_nothing_left_is_an_error_that_counts_the_reasons(tmp_path):
    structures = write_files(tmp_path / "structures", BAD)
    with pytest.raises(BuildError, match="none of 6 entries gave a sample .unreadable 2.*skipped.tsv"):
        build(structures, tmp_path / "out")
    assert len(skipped_rows(tmp_path / "out")) == 7
    with pytest.raises(ShardError, match="no shards in"):
        ShardSet(tmp_path / "out", "train")


def test_too_large_a_share_of_failures_stops_before_writing(structures, tmp_path):
    with pytest.raises(BuildError, match=r"6 of 11 entries failed \(54.5%\), more than max_failed_share 50.0%"):
        build(structures, tmp_path / "out", max_failed_share=0.5)
    # What was parsed is kept: the same command with another share need not parse it again.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".build", "skipped.tsv"]
    # Chains outside the asked lengths are not failures.
    build(structures, tmp_path / "out", max_failed_share=0.6, max_residues=7, test_fraction=0)
