"""The build on hand-made PDB and mmCIF files: which are taken, which are set aside and why, which are for testing."""

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import pytest

from proteingpt.data.build import BuildError, _mpi_world, _name_dead, build, format_report, parse_batch, world_size
from proteingpt.data.crew import Crew
from proteingpt.data.entries import read_outcome
from proteingpt.data.filters import Filters, Skip
from proteingpt.data.pieces import holding, job_key, take_notes
from proteingpt.data.shards import ShardError, ShardSet, find_faults
from proteingpt.data.sources import Job
from proteingpt.protein import Turn

NAMES = dict(A="ALA", C="CYS", D="ASP", E="GLU", F="PHE", G="GLY", K="LYS", M="MET", W="TRP", X="UNK")
HEADER = "HEADER    TRANSPORT PROTEIN                       02-JAN-94   {}"


def pdb_text(entry: str, chains: dict[str, str], atoms: str = "N CA C", missing: int = 0) -> str:
    """A PDB file: the chains as letters, each residue with `atoms`, the first `missing` of each chain unresolved."""
    lines = [HEADER.format(entry.upper()), f"TITLE     STRUCTURE OF {entry.upper()}"]
    lines += ["EXPDTA    X-RAY DIFFRACTION", "REMARK   2 RESOLUTION.    1.80 ANGSTROMS."]
    for chain, letters in chains.items():
        residues = "".join(f" {NAMES[letter]}" for letter in letters)
        lines.append(f"SEQRES   1 {chain} {len(letters):4d} {residues}")
    serial = 0
    for chain, letters in chains.items():
        for number, letter in list(enumerate(letters, 1))[missing:]:
            for offset, name in enumerate(atoms.split()):
                serial += 1
                x = 3.8 * number + offset
                lines.append(
                    f"ATOM  {serial:5d}  {name:<3s} {NAMES[letter]} {chain}{number:4d}    "
                    f"{x:8.3f}{1.0:8.3f}{2.0:8.3f}{1.0:6.2f}{10.0:6.2f}           {name[0]}"
                )
        lines.append("TER")
    return "\n".join(lines + ["END", ""])


def cif_text(entry: str, letters: str) -> str:
    """An mmCIF file of one chain, whose label id is X and whose author id is A."""
    sequence = "\n".join(f"1 {number} {NAMES[letter]}" for number, letter in enumerate(letters, 1))
    atoms = "\n".join(
        f"ATOM {3 * number + offset} {name[0]} {name} . {NAMES[letter]} X 1 {number} {number} A "
        f"{3.8 * number + offset:.3f} 1.000 2.000 1.00 10.00 1"
        for number, letter in enumerate(letters, 1)
        for offset, name in enumerate(("N", "CA", "C"))
    )
    return f"""data_{entry.upper()}
_entry.id {entry.upper()}
#
_struct.title 'Structure of {entry}'
#
loop_
_entity_poly.entity_id
_entity_poly.type
1 polypeptide(L)
#
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
{sequence}
#
loop_
_struct_asym.id
_struct_asym.entity_id
X 1
#
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.pdbx_PDB_model_num
{atoms}
#
"""


def write_files(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


GOOD = {f"{n}abc.pdb": pdb_text(f"{n}abc", {"A": "ACDEFG" + "K" * n}, missing=1) for n in range(1, 6)}
BAD = {
    "6bad.cif": cif_text("6bad", "ACDEFG")[:-200],
    "6emp.cif": "",
    "6noa.pdb": pdb_text("6noa", {"B": "ACD"}),
    "6cao.pdb": pdb_text("6cao", {"A": "ACD"}, atoms="CA"),
    "6unk.pdb": pdb_text("6unk", {"A": "XXX"}),
    "6dot.v2.cif": cif_text("6dot.v2", "ACD"),
}


@pytest.fixture
def structures(tmp_path):
    return write_files(tmp_path / "structures", GOOD | BAD)


def skipped_rows(out: Path) -> list[list[str]]:
    return [line.split("\t") for line in (out / "skipped.tsv").read_text().splitlines()]


# --- a whole build


def test_a_sample_holds_what_stands_in_its_file(structures, tmp_path):
    report = build(structures, tmp_path / "out", test_fraction=0)
    shard_set = ShardSet(tmp_path / "out", "train")
    assert shard_set.keys == ["1abc_A", "2abc_A", "3abc_A", "4abc_A", "5abc_A"] and report.samples["test"] == 0
    sample = shard_set.read(0)
    assert sample.protein.sequence == "ACDEFGK"
    assert sample.protein.resolved.tolist() == [False] + [True] * 6
    np.testing.assert_allclose(sample.protein.backbone[1, :, 0], [7.6, 8.6, 9.6], rtol=1e-6)
    assert Turn("How many residues does this protein chain have?", "7") in sample.turns
    assert Turn("How many residues of this protein chain are unresolved?", "1") in sample.turns
    assert Turn("What is the resolution in angstroms for this protein?", "1.8") in sample.turns
    assert "STRUCTURE OF 1ABC" in sample.description
    assert sample.metadata["source"]["file"] == "1abc.pdb" and len(sample.metadata["source"]["sha256"]) == 64
    assert sample.metadata["facts"]["methods"] == ["X-RAY DIFFRACTION"]


def test_every_entry_is_a_sample_or_a_skip_with_file_and_reason(structures, tmp_path):
    out = tmp_path / "out"
    report = build(structures, out)
    assert report.num_entries == 11 and report.num_samples == 5 and len(report.skips) == 6
    assert {(skip.file, skip.reason) for skip in report.skips} == {
        ("6bad.cif", "unreadable"),
        ("6emp.cif", "unreadable"),
        ("6noa.pdb", "no such protein chain"),
        ("6cao.pdb", "chain unusable"),
        ("6unk.pdb", "no standard residue"),
        ("6dot.v2.cif", "bad key"),
    }
    assert all(skip.detail for skip in report.skips)
    rows = skipped_rows(out)
    assert rows[0] == ["file", "entry", "chain", "reason", "detail"]
    assert sorted(row[0] for row in rows[1:]) == sorted(BAD)
    written = json.loads((out / "report.json").read_text())
    assert (written["num_entries"], written["num_samples"], written["num_skipped"]) == (11, 5, 6)
    assert written["skipped"]["unreadable"] == 2 and written["samples"] == report.samples


def test_the_bytes_do_not_depend_on_the_number_of_workers(structures, tmp_path):
    for workers in (1, 2):
        build(structures, tmp_path / f"out{workers}", workers=workers, samples_per_shard=2)
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert "train-00001.tar" in names and names == sorted(path.name for path in (tmp_path / "out2").iterdir())
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name


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


def test_a_mended_file_is_read_when_the_build_goes_on(tmp_path):
    """What a build keeps of an entry is known by all of its files."""
    files = {"1abc.cif": "", "1abc.pdb": pdb_text("1abc", {"A": "GGG"}), "2abc.pdb": pdb_text("2abc", {"A": "GGG"})}
    structures = write_files(tmp_path / "structures", files)
    jobs = [Job(structures / "1abc.cif", "1abc.cif", "1abc", others=((structures / "1abc.pdb", "1abc.pdb"),))]
    before = job_key(jobs[0], Filters())
    assert job_key(jobs[0], Filters()) == before
    write_files(structures, {"1abc.pdb": pdb_text("1abc", {"A": "GGGG"})})
    assert job_key(jobs[0], Filters()) != before


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


def test_without_any_date_the_date_split_says_what_to_give(tmp_path):
    structures = write_files(tmp_path / "structures", {f"{n}abc.cif": cif_text(f"{n}abc", "ACD") for n in (1, 2)})
    with pytest.raises(BuildError, match=r"none of 2 entries gave a sample \(no date 2\)"):
        build(structures, tmp_path / "out", split="date")
    assert "give --facts" in skipped_rows(tmp_path / "out")[1][4]


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


@pytest.mark.nightly
def test_a_parsing_process_that_dies_is_named_with_the_file_it_had(tmp_path):
    """A worker is killed while it waits for a file that does not come (a pipe nobody writes to)."""
    os.mkfifo(tmp_path / "1abc.cif")
    work = tmp_path / "work"
    work.mkdir()

    def kill_reader() -> None:
        while not (notes := [note for note in work.glob("reading-*") if note.read_text()]):
            time.sleep(0.01)
        os.kill(int(notes[0].name.rpartition("-")[2]), signal.SIGKILL)

    threading.Thread(target=kill_reader, daemon=True).start()
    jobs = [("key", Job(tmp_path / "1abc.cif", "1abc.cif", "1abc"))]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        crew = Crew(executor, 1, here=False)
        with pytest.raises(BrokenProcessPool):
            list(crew.run(partial(parse_batch, filters=Filters(), work=work), [jobs]))
    message = _name_dead(work, crew)
    assert "died while reading 1abc.cif (process" in message and "ended with -9" in message


# --- facts, abstracts and questions from elsewhere

TEXT = {"pdb_id": "2abc", "caption": "We solved it."}


def annotation(entry: str, date: str, entities: dict[str, str]) -> str:
    """A file of RCSB's Data API, as far as it is read."""
    answer = {
        "rcsb_id": entry.upper(),
        "struct": {"title": f"{entry} at RCSB"},
        "rcsb_accession_info": {"initial_release_date": f"{date}T00:00:00Z"},
        "polymer_entities": [
            {"rcsb_polymer_entity_container_identifiers": {"entity_id": number, "auth_asym_ids": [chain]}}
            for chain, number in entities.items()
        ],
    }
    return json.dumps(answer)


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
    lots = build(structures, tmp_path / "lots", facts=facts, clusters=clusters, test_fraction=0.2, seed=0)
    (key,) = ShardSet(tmp_path / "lots", "test").keys
    alone = key == "3abc_A"
    assert lots.leak["share_test_samples_in_train_clusters"] == (0.0 if alone else 1.0)


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


# --- going on


def test_another_start_takes_up_what_was_parsed_unless_the_file_has_changed(structures, tmp_path):
    with pytest.raises(BuildError, match="more than max_failed_share"):
        build(structures, tmp_path / "out", max_failed_share=0)
    (structures / "5abc.pdb").write_text(pdb_text("5abc", {"A": "GGGG"}))
    report = build(structures, tmp_path / "out", test_fraction=0)
    assert report.num_continued == 10
    assert ShardSet(tmp_path / "out", "train").read(4).protein.sequence == "GGGG"
    assert not (tmp_path / "out" / ".build").exists()


def test_a_damaged_piece_is_parsed_again(structures, tmp_path):
    with pytest.raises(BuildError, match="more than max_failed_share"):
        build(structures, tmp_path / "out", max_failed_share=0)
    (piece,) = (tmp_path / "out" / ".build").glob("*.data")
    piece.write_bytes(piece.read_bytes()[:-1])
    assert build(structures, tmp_path / "out").num_continued == 0
    assert find_faults(tmp_path / "out") == []


# --- refused


def test_shards_are_overwritten_only_when_asked(structures, tmp_path):
    out = tmp_path / "out"
    build(structures, out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(BuildError, match="already holds shards .*--overwrite"):
        build(structures, out, seed=1)
    assert (out / "manifest.json").read_bytes() == before
    build(structures, out, seed=1, overwrite=True)
    assert json.loads((out / "manifest.json").read_text())["options"]["seed"] == 1
    ShardSet(out, "train").verify()


def test_a_second_build_into_the_same_directory_is_refused_while_the_first_runs(structures, tmp_path):
    with holding(tmp_path / "out"), pytest.raises(BuildError, match="another build writes to .*wait for it"):
        build(structures, tmp_path / "out")
    build(structures, tmp_path / "out")
    assert not (tmp_path / "out" / ".building").exists()


def test_the_manifest_has_the_checksums_of_the_files_that_texts_and_split_came_from(structures, tmp_path):
    abstracts, qa = tmp_path / "abstract.json", tmp_path / "qa.json"
    abstracts.write_text(json.dumps([{"pdb_id": "1abc", "caption": "We solved it."}]))
    qa.write_text(json.dumps({"1abc": [{"Q": "Why?", "A": "So."}]}))
    report = build(structures, tmp_path / "out", abstracts=abstracts, qa=[qa])
    wanted = {"abstracts": [sha256(abstracts.read_bytes()).hexdigest()], "qa": [sha256(qa.read_bytes()).hexdigest()]}
    options = json.loads((tmp_path / "out/manifest.json").read_text())["options"]
    assert options == report.options and options["source_sha256"] == wanted and options["released_until"] is None


def test_a_full_disk_is_not_laid_to_the_file_that_was_read(structures, tmp_path):
    """/dev/full gives the system's own error, here in the place of the piece of this job."""
    work = tmp_path / "out" / ".build"
    work.mkdir(parents=True)
    path = structures / "1abc.pdb"
    job = Job(path, path.name, "1abc")
    name = blake2b(job_key(job, Filters()).encode(), digest_size=16).hexdigest()
    (work / f"{name}.data.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        parse_batch([(job_key(job, Filters()), job)], Filters(), work)
    assert take_notes(work) == {}


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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chain": ""}, "chain is ''"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"samples_per_shard": 0}, "samples_per_shard is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"min_residues": 0}, "min_residues is 0"),
        ({"max_residues": 3, "min_residues": 4}, "max_residues 3 is less than min_residues 4"),
        ({"max_failed_share": 2}, "max_failed_share is 2"),
        ({"max_resolution": 0}, "max_resolution is 0"),
        ({"shard_mb": 0}, "shard_mb is 0"),
        ({"split": "random"}, "split is 'random', wanted one of paper, date, cluster, published"),
        ({"test_from": "2020-01-01"}, "test_from goes with split date"),
        ({"test_from": "2020-1-1", "split": "date"}, "test_from is '2020-1-1', wanted a day"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_made(structures, tmp_path, options, message):
    with pytest.raises(BuildError, match=message):
        build(structures, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_directories_are_named(tmp_path):
    with pytest.raises(BuildError, match="no directory .*none"):
        build(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match="no structure file in .*empty"):
        build(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(BuildError, match="no source: give --structures"):
        build(None, tmp_path / "out")
    write_files(tmp_path / "one", {"1abc.pdb": GOOD["1abc.pdb"]})
    # One entry is trained on, whatever the share; by a date all may be new.
    assert build(tmp_path / "one", tmp_path / "out", test_fraction=0.9).samples == {"train": 1, "test": 0}
    with pytest.raises(BuildError, match="date split of 1 entries leaves none to train on"):
        build(tmp_path / "one", tmp_path / "out2", split="date", test_from="1990-01-01")


# --- MPI


@pytest.mark.parametrize(
    "environ, size",
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 4),
        ({"PMI_SIZE": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "3"}, 3),
        # In the batch shell of an sbatch job: tasks are allotted, but srun has started none.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),
    ],
)
def test_launchers_are_known_by_their_environment(environ, size):
    assert world_size(environ) == size


def test_ranks_without_mpi_are_refused_rather_than_each_building_everything():
    """srun without PMI: here MPI either is not installed or sees one process; both must be told."""
    with pytest.raises(BuildError, match="3 processes"):
        _mpi_world({"SLURM_STEP_NUM_TASKS": "3"})
    assert _mpi_world(dict(os.environ) | {"SLURM_STEP_NUM_TASKS": "1"}) is None
