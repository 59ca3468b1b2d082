"""The build on hand-made PDB and mmCIF files: which are taken, which are set aside and why, which are for testing."""

import json
import os
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.build import (
    BuildError,
    ReadOptions,
    Skip,
    _mpi_outcomes,
    _mpi_world,
    _outcomes,
    build,
    choose_files,
    draw_test_entries,
    entry_name,
    format_report,
    read_outcome,
    wanted_chains,
    world_size,
)
from proteingpt.data.shards import ShardError, ShardSet
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
    assert sample.turns[:2] == (
        Turn("How many residues does this protein chain have?", "7"),
        Turn("How many residues of this protein chain are unresolved?", "1"),
    )
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
    for name in set(names) - {"report.json"}:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name


def test_all_chains_of_an_entry_are_on_one_side(tmp_path):
    files = {f"{n}abc.pdb": pdb_text(f"{n}abc", {"A": "ACD", "a": "GGGG", "B": "MK"}) for n in range(1, 6)}
    structures = write_files(tmp_path / "structures", files)
    report = build(structures, tmp_path / "out", chain="all", test_fraction=0.4)
    sides = {split: ShardSet(tmp_path / "out", split).keys for split in ("train", "test")}
    assert report.entries == {"train": 3, "test": 2} and report.samples == {"train": 9, "test": 6}
    entries = {split: {key.split("_")[0] for key in keys} for split, keys in sides.items()}
    assert not entries["train"] & entries["test"]
    assert all([f"{entry}_A", f"{entry}_a", f"{entry}_B"] == keys for entry, keys in by_entry(sides["train"]).items())
    # All five hold the same three sequences: the report must say that the split separates nothing.
    assert report.num_test_sequences_in_train == 6 and "6 test samples" in format_report(report)


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

    def fail(path):
        raise ZeroDivisionError("no atoms")

    monkeypatch.setattr("proteingpt.data.build.read_entry", fail)
    outcome = read_outcome(path, ReadOptions(tmp_path, "A", 1, None))
    assert outcome.skips == (Skip("1abc.pdb", "1abc", "", "reader failed", "ZeroDivisionError: no atoms"),)


class DeadlyPath(type(Path())):
    """A path that ends the process it is sent to, as the system does to one that takes too much memory."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_parsing_process_that_dies_is_told_with_the_files_it_may_have_had(tmp_path):
    path = write_files(tmp_path, {"1abc.pdb": pdb_text("1abc", {"A": "ACD"})}) / "1abc.pdb"
    with pytest.raises(BuildError, match="a parsing process died.* on one of: 1abc.pdb; give fewer workers"):
        list(_outcomes([path], ReadOptions(DeadlyPath(tmp_path), "A", 1, None), workers=2))


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
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["skipped.tsv"]
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
    write_files(tmp_path / "one", {"1abc.pdb": GOOD["1abc.pdb"]})
    with pytest.raises(BuildError, match="test_fraction 0.9 of 1 entries leaves none to train on"):
        build(tmp_path / "one", tmp_path / "out", test_fraction=0.9)


# --- the parts


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("1ABC.cif.gz", ("1abc", 1)),
        ("1abc.bcif", ("1abc", 0)),
        ("pdb1abc.ent.gz", ("1abc", 2)),
        ("pdb1abc.pdb", ("pdb1abc", 2)),
        ("AF-P29373-F1.cif", ("af-p29373-f1", 1)),
        ("model.v2.PDB", ("model.v2", 2)),
    ],
)
def test_the_entry_is_told_by_the_name_of_the_file(name, wanted):
    assert entry_name(Path(name)) == wanted


def test_binarycif_is_preferred_to_mmcif_to_pdb():
    root = Path("/data")
    files = [root / name for name in ("1abc.pdb", "1abc.cif", "b/1abc.bcif", "a/1abc.bcif", "2abc.ent", "2abc.mmcif")]
    chosen, duplicates = choose_files(files, root)
    assert chosen == [root / "a/1abc.bcif", root / "2abc.mmcif"]
    assert [skip.file for skip in duplicates] == ["b/1abc.bcif", "1abc.cif", "1abc.pdb", "2abc.ent"]
    assert duplicates[0].detail == "the entry is read from a/1abc.bcif"


@given(
    entries=st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=40),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_the_split_is_exact_and_does_not_depend_on_the_order(entries, fraction, seed):
    test = draw_test_entries(entries, fraction, seed)
    assert len(test) == round(fraction * len(entries)) and test <= set(entries)
    assert draw_test_entries(entries[::-1], fraction, seed) == test


def test_another_seed_draws_another_split():
    entries = [f"{n}abc" for n in range(100)]
    assert draw_test_entries(entries, 0.2, 1) != draw_test_entries(entries, 0.2, 2)


def test_wanted_chains():
    assert wanted_chains("all", ("A", "B")) == ["A", "B"] and wanted_chains("first", ("B", "A")) == ["B"]
    assert wanted_chains("C", ("A",)) == ["C"] and wanted_chains("label:X", ("A",)) == ["label:X"]


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


class ThreadComm:
    """What the build uses of an mpi4py communicator, between threads."""

    def __init__(self, rank: int, boxes: dict[int, queue.Queue]):
        self.rank, self.size, self.boxes = rank, len(boxes), boxes

    def send(self, message, dest: int) -> None:
        assert dest == 0
        self.boxes[self.rank].put(message)

    def recv(self, source: int):
        return self.boxes[source].get(timeout=10)


@pytest.mark.parametrize("size", [2, 3, 20])
def test_rank_0_gets_every_outcome_in_order_whatever_the_number_of_ranks(structures, size):
    options = ReadOptions(structures, "A", 1, None)
    paths = sorted(structures.iterdir())
    boxes = {rank: queue.Queue() for rank in range(size)}
    others = [
        threading.Thread(target=lambda comm: list(_mpi_outcomes(paths, options, comm)), args=(ThreadComm(rank, boxes),))
        for rank in range(1, size)
    ]
    for thread in others:
        thread.start()
    outcomes = list(_mpi_outcomes(paths, options, ThreadComm(0, boxes)))
    for thread in others:
        thread.join()
    assert [outcome.file for outcome in outcomes] == [path.name for path in paths]
