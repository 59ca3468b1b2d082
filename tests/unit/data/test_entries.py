"""One entry, from its files and what is known of it to a sample, or to the reason why there is none."""

import json

import pytest
from entry_files import GOOD, HEADER, annotation, cif_text, pdb_text, skipped_rows, write_files

from proteingpt.data.build import BuildError, build, format_report
from proteingpt.data.entries import read_outcome
from proteingpt.data.filters import Filters, Skip
from proteingpt.data.shards import ShardSet
from proteingpt.data.sources import Job
from proteingpt.protein import Turn


@pytest.mark.parametrize(
    "chain, keys, reasons",
    [
        ("A", ["1abc_A"], ["no such protein chain"]),
        ("B", ["1two_B"], ["no such protein chain"]),
        ("first", ["1abc_A", "1two_B"], []),
        # PDB format has no label ids.
        ("label:X", ["1abc_A"], ["chain unusable"]),
    ],
)
def test_the_chain_is_chosen_by_author_id_label_id_or_place(tmp_path, chain, keys, reasons):
    files = {"1abc.cif": cif_text("1abc", "ACDEFG"), "1two.pdb": pdb_text("1two", {"B": "ACD", "C": "GGG"})}
    structures = write_files(tmp_path / "structures", files)
    report = build(structures, tmp_path / "out", chain=chain, test_fraction=0)
    assert ShardSet(tmp_path / "out", "train").keys == keys
    assert [skip.reason for skip in report.skips] == reasons


def test_an_entry_in_several_formats_counts_once(tmp_path):
    files = {"1abc.pdb": pdb_text("1abc", {"A": "GGG"}), "sub/1ABC.cif": cif_text("1abc", "ACDEFG")}
    # Another name for the same entry, which only its content tells.
    files["copy.cif"] = cif_text("1abc", "ACDEFG")
    structures = write_files(tmp_path / "structures", files)
    report = build(structures, tmp_path / "out", test_fraction=0)
    assert (report.num_files, report.num_entries, report.num_samples) == (3, 1, 1)
    assert ShardSet(tmp_path / "out", "train").read(0).protein.sequence == "ACDEFG"
    assert sorted(row[0] for row in skipped_rows(tmp_path / "out")[1:]) == ["1abc.pdb", "copy.cif"]
    assert {skip.reason for skip in report.duplicates} == {"duplicate"} and report.skips == []


def test_a_damaged_file_is_replaced_by_another_of_its_entry_and_the_report_says_so(tmp_path):
    """The mmCIF files come first, as they would if they were whole; of 2abc neither file can be read."""
    whole = {"1abc.pdb": pdb_text("1abc", {"A": "GGG"}), "1abc.ent": pdb_text("1abc", {"A": "GG"})}
    files = {"1abc.cif": cif_text("1abc", "GGG")[:-200], **whole, "2abc.cif": "", "2abc.pdb": "no structure\n"}
    report = build(write_files(tmp_path / "structures", files), tmp_path / "out", test_fraction=0)
    sample = ShardSet(tmp_path / "out", "train").read(0)
    assert sample.metadata["source"]["file"] == "1abc.ent" and sample.protein.sequence == "GG"
    assert (report.num_files, report.num_entries, report.num_samples, report.num_replaced) == (5, 2, 1, 1)
    assert [(skip.file, skip.reason) for skip in report.skips] == [("2abc.cif", "unreadable")]
    rows = {row[0]: row[3:] for row in skipped_rows(tmp_path / "out")[1:]}
    assert rows["1abc.cif"][0] == "replaced" and rows["1abc.cif"][1].endswith("; the entry is read from 1abc.ent")
    assert rows["1abc.pdb"] == ["duplicate", "the entry is read from 1abc.ent"]
    assert rows["2abc.pdb"][0] == "duplicate" and rows["2abc.pdb"][1].startswith("unreadable: neither mmCIF")
    assert "1 damaged files, replaced by another file of their entry" in format_report(report)


REVISIONS = "\nloop_\n_pdbx_audit_revision_history.ordinal\n_pdbx_audit_revision_history.revision_date\n{}\n#\n"


def test_the_day_of_release_is_taken_from_the_file_where_no_annotation_gives_it(tmp_path):
    """Released on 1 May, 2 May (PDB format: REVDAT 1) and 3 May 2001; 4abc says no more than its year, 2001."""
    revdat = ["REVDAT   2   24-FEB-09 2ABC    1       VERSN", "REVDAT   1   02-MAY-01 2ABC    0"]
    header = HEADER.format("4ABC").replace("94", "01")
    files = {
        "1abc.cif": cif_text("1abc", "ACD") + REVISIONS.format("1 2001-05-01\n2 2011-07-13"),
        "2abc.pdb": "\n".join([HEADER.format("2ABC"), *revdat, *pdb_text("2abc", {"A": "GGG"}).split("\n")[1:]]),
        "3abc.cif": cif_text("3abc", "ACD") + REVISIONS.format("1 2001-05-03"),
        "4abc.pdb": "\n".join([header, *pdb_text("4abc", {"A": "GGG"}).split("\n")[1:]]),
    }
    structures = write_files(tmp_path / "structures", files)
    for day, keys in (("2001-05-02", ["2abc_A", "3abc_A"]), ("2001-05-03", ["3abc_A"])):
        build(structures, tmp_path / "out", split="date", test_from=day, overwrite=True)
        assert ShardSet(tmp_path / "out", "test").keys == keys


def test_lengths_outside_the_limits_are_skipped_with_both_numbers(structures, tmp_path):
    report = build(structures, tmp_path / "out", min_residues=8, max_residues=9, test_fraction=0)
    assert ShardSet(tmp_path / "out", "train").keys == ["2abc_A", "3abc_A"]
    details = {skip.file: skip.detail for skip in report.skips if skip.reason in ("too short", "too long")}
    assert details == {
        "1abc.pdb": "7 residues, wanted at least 8",
        "4abc.pdb": "10 residues, wanted at most 9",
        "5abc.pdb": "11 residues, wanted at most 9",
        "6dot.v2.cif": "3 residues, wanted at least 8",
    }


def test_a_fault_of_the_reader_is_a_skip_too(tmp_path, monkeypatch):
    """A file on which the reader itself fails is named, and the build goes on."""
    path = write_files(tmp_path, {"1abc.pdb": pdb_text("1abc", {"A": "ACD"})}) / "1abc.pdb"

    def fail(path, **_):
        raise ZeroDivisionError("no atoms")

    monkeypatch.setattr("proteingpt.data.entries.read_entry", fail)
    outcome = read_outcome(Job(path, "1abc.pdb", "1abc"), Filters())
    assert outcome.skips == (Skip("1abc.pdb", "1abc", "", "reader failed", "ZeroDivisionError: no atoms"),)


def test_a_file_that_takes_too_long_is_named_and_read_by_the_next_start_that_allows_more(tmp_path):
    """No file is read in a millionth of a second."""
    structures = write_files(tmp_path / "structures", GOOD)
    with pytest.raises(BuildError, match=r"none of 5 entries gave a sample \(too slow 5\)"):
        build(structures, tmp_path / "out", seconds_per_file=1e-6)
    row = skipped_rows(tmp_path / "out")[1]
    assert row[:4] == ["1abc.pdb", "1abc", "", "too slow"] and "not read within 1e-06 s" in row[4]
    report = build(structures, tmp_path / "out")
    assert (report.num_continued, report.num_samples) == (0, 5)
    assert report.options["seconds_per_file"] == 300


def test_a_fault_of_the_disk_is_no_fault_of_the_file(tmp_path):
    """/proc/self/mem is a file whose reading ends in the system's own I/O error; 2abc is packed, and damaged."""
    structures = write_files(tmp_path / "structures", GOOD)
    (structures / "2abc.pdb").unlink()
    (structures / "2abc.pdb.gz").write_bytes(b"\x1f\x8bno gzip")
    (structures / "6dsk.cif").symlink_to("/proc/self/mem")
    report = build(structures, tmp_path / "out", test_fraction=0)
    assert {(skip.file, skip.reason) for skip in report.skips} == {
        ("2abc.pdb.gz", "unreadable"), ("6dsk.cif", "read error")
    }  # fmt: skip
    assert "no fault of the files" in format_report(report)
    assert "Input/output error" in next(skip.detail for skip in report.skips if skip.entry == "6dsk")


TEXT = {"pdb_id": "2abc", "caption": "We solved it."}


def test_the_abstract_is_the_description_and_the_rest_falls_where_it_is_required(structures, tmp_path):
    abstracts = tmp_path / "abstract.json"
    abstracts.write_text(json.dumps([TEXT]))
    build(structures, tmp_path / "free", abstracts=abstracts, test_fraction=0)
    samples = {s.key: s for s in map(ShardSet(tmp_path / "free", "train").read, range(5))}
    assert samples["2abc_A"].description == "We solved it."
    assert samples["2abc_A"].metadata["description_from"] == "abstract"
    assert "STRUCTURE OF 1ABC" in samples["1abc_A"].description
    assert samples["1abc_A"].metadata["description_from"] == "facts"
    report = build(structures, tmp_path / "strict", abstracts=abstracts, require_abstract=True, test_fraction=0)
    assert report.samples["train"] == 1 and report.skipped_by_reason == {"no abstract": 10}
    assert report.funnel[:2] == [("entries", 11), ("has an abstract", 1)]


def test_given_questions_follow_the_computed_ones_and_replace_those_of_the_same_wording(structures, tmp_path):
    asked = "How many residues does this protein chain have?"
    qa = {"1ABC": [{"Q": asked, "A": "seven"}, {"Q": "What binds it?", "A": "Nothing."}]}
    (tmp_path / "qa.json").write_text(json.dumps(qa))
    build(structures, tmp_path / "out", qa=[tmp_path / "qa.json"], test_fraction=0)
    turns = ShardSet(tmp_path / "out", "train").read(0).turns
    assert turns[-2:] == (Turn(asked, "seven"), Turn("What binds it?", "Nothing."))
    assert [turn.question for turn in turns].count(asked) == 1


def test_rcsb_has_the_word_over_the_file_and_the_file_fills_the_rest(structures, tmp_path):
    facts = write_files(tmp_path / "facts", {"1abc.json": annotation("1abc", "2001-05-06", {})})
    build(structures, tmp_path / "out", facts=facts, test_fraction=0)
    found = ShardSet(tmp_path / "out", "train").read(0).metadata["facts"]
    assert found["title"] == "1abc at RCSB" and found["resolution"] == 1.8


def test_wwpdbs_long_ids_meet_facts_texts_clusters_and_splits_under_the_short_ones(tmp_path):
    """Every file names the entries otherwise: 1abc and 2abc are pdb_00001abc and pdb_00002abc."""
    files = {f"pdb_0000{n}abc_xyz_v1-2.cif": cif_text(f"pdb_0000{n}abc", "ACDEFG") for n in (1, 2)}
    structures = write_files(tmp_path / "structures", files)
    facts = write_files(tmp_path / "facts", {"1abc.json": annotation("1abc", "2001-05-06", {"A": "1"})})
    abstracts = write_files(tmp_path / "texts", {"PDB_00001ABC.txt": "We solved it.", "2abc.txt": "We too."})
    (tmp_path / "dataset.json").write_text(json.dumps({"train": ["PDB_00001ABC"], "test": ["2abc"]}))
    (tmp_path / "clusters.txt").write_text("PDB_00001ABC_1\n2ABC_1\n")
    given = dict(
        facts=facts, abstracts=abstracts, dataset=tmp_path / "dataset.json", clusters=tmp_path / "clusters.txt"
    )
    report = build(structures, tmp_path / "out", split="published", **given)
    train = ShardSet(tmp_path / "out", "train").read(0)
    assert train.key == "1abc_A" and train.description == "We solved it." and not report.skips
    assert train.metadata["facts"]["title"] == "1abc at RCSB"
    assert ShardSet(tmp_path / "out", "test").keys == ["2abc_A"]
    assert report.leak["num_test_samples_in_train_clusters"] == 0
