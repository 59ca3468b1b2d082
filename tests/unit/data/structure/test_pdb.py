"""Chains of PDB format: the place of each residue in SEQRES, by REMARK 465, bonds and numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_files import numbered, pdb, pdb_atom, residue, rows

from proteingpt.data.structure import StructureError, read_entry


def test_insertion_codes_are_residues_of_their_own(entry):
    """60, 60A, 60B, then 61, as thrombin has them."""
    atoms = residue("TYR", 1, 60) + residue("PRO", 2, 60, code="A") + residue("PRO", 3, 60, code="B")
    atoms += residue("TRP", 4, 61)
    for seqres in (None, {"A": ("TYR", "PRO", "PRO", "TRP")}):
        protein = entry(pdb(atoms, seqres), "9xyz.pdb").protein()
        assert protein.sequence == "YPPW"
        np.testing.assert_array_equal(protein.backbone, rows(1, 2, 3, 4))


REPEATS = ("ALA", "ALA", "ALA", "GLY", "ALA", "ALA")


def test_remark_465_places_a_gap_among_equal_letters(entry):
    """Missing 12 and 15 of AAAGAA: by letters alone the ambiguous residues could go elsewhere."""
    head = """
    REMARK 465
    REMARK 465   M RES C SSSEQI
    REMARK 465     ALA A    12
    REMARK 465     ALA A    15
    """
    atoms = [a for p in (1, 3, 4, 6) for a in residue(REPEATS[p - 1], p, p + 10)]
    protein = entry(pdb(atoms, {"A": REPEATS}, head), "9xyz.pdb").protein()
    assert protein.sequence == "AAAGAA"
    np.testing.assert_array_equal(protein.backbone, rows(1, 0, 3, 4, 0, 6))


def test_without_remark_465_chain_breaks_and_numbers_place_the_gap(entry):
    atoms = [a for p in (1, 3, 4, 6) for a in residue(REPEATS[p - 1], p, p + 10)]
    protein = entry(pdb(atoms, {"A": REPEATS}), "9xyz.pdb").protein()
    np.testing.assert_array_equal(protein.backbone, rows(1, 0, 3, 4, 0, 6))


def test_a_bond_outweighs_the_numbering(entry):
    """Residues 2 and 3 are bonded, so they are neighbours, although their numbers (2, 40) say otherwise."""
    names = ("GLY", "ALA", "SER", "ALA", "SER")
    atoms = residue("GLY", 1) + residue("ALA", 2) + residue("SER", 3, 40)
    protein = entry(pdb(atoms, {"A": names}), "9xyz.pdb").protein()
    np.testing.assert_array_equal(protein.backbone, rows(1, 2, 3, 0, 0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["ALA", "GLY"]), min_size=3, max_size=9), st.data())
def test_numbering_and_breaks_place_any_observed_subset(tmp_path_factory, names, data):
    """Two kinds of residue only, so letters say little. Leading residues are kept: nothing tells those apart."""
    places = sorted({1} | data.draw(st.sets(st.integers(2, len(names)))))
    path = tmp_path_factory.mktemp("subset") / "9xyz.pdb"
    path.write_text(pdb([a for p in places for a in residue(names[p - 1], p)], {"A": names}))
    expected = rows(*(p if p in places else 0 for p in range(1, len(names) + 1)))
    np.testing.assert_array_equal(read_entry(path).protein().backbone, expected)


def test_hybrid_36_and_negative_numbers(entry):
    atoms = residue("GLY", 1, -5) + residue("ALA", 2, 9999) + residue("SER", 3, "A000")
    protein = entry(pdb(atoms, {"A": ("GLY", "ALA", "SER")}), "9xyz.pdb").protein()
    np.testing.assert_array_equal(protein.backbone, rows(1, 2, 3))


def test_ligands_after_ter_are_no_residues_even_if_they_are_amino_acids(entry):
    text = pdb(residue("GLY", 1) + residue("ALA", 2), {"A": ("GLY", "ALA", "GLY")})
    ligand = "\n".join(pdb_atom(9, a) for a in residue("GLY", 3, 301, hetero=True))
    protein = entry(text.replace("END", f"TER       7      ALA A   2\n{ligand}\nEND"), "9xyz.pdb").protein()
    np.testing.assert_array_equal(protein.backbone, rows(1, 2, 0))


def test_only_the_first_model_of_a_pdb_file(entry):
    first = "\n".join(pdb_atom(i, a) for i, a in enumerate(residue("GLY", 1)))
    second = "\n".join(pdb_atom(i, a) for i, a in enumerate(residue("GLY", 1, shift=0.5) + residue("ALA", 2)))
    read = entry(f"MODEL        1\n{first}\nENDMDL\nMODEL        2\n{second}\nENDMDL\nEND\n", "9xyz.pdb")
    np.testing.assert_array_equal(read.protein().backbone, rows(1))
    assert read.facts.num_models == 2


def test_a_blank_chain_has_a_name_to_ask_for(entry):
    read = entry(pdb(residue("GLY", 1, chain=" ")), "old.pdb")
    assert read.chains == ("_",)
    assert read.protein("_").sequence == "G"


def test_modres_gives_the_parent(entry):
    head = "MODRES 9XYZ Q9Z A    1  LYS  INVENTED\nMODRES 9XYZ MSE A    2  MET  SELENOMETHIONINE"
    atoms = residue("Q9Z", 1, hetero=True) + residue("MSE", 2, hetero=True)
    assert entry(pdb(atoms, {"A": ("Q9Z", "MSE")}, head), "9xyz.pdb").protein().sequence == "KM"


def test_seqres_that_does_not_fit_the_coordinates_is_refused(entry):
    atoms = [a for p in range(1, 6) for a in residue("TRP", p)]
    with pytest.raises(StructureError, match=r"SEQRES of chain 'A' \(5 residues\) does not fit .*: 5 of 5 observed"):
        entry(pdb(atoms, {"A": ("GLY",) * 5}), "9xyz.pdb")


def test_a_cut_seqres_is_refused(entry):
    text = pdb(residue("GLY", 1), {"A": ("GLY", "ALA")}).replace(" ALA", "", 1)
    with pytest.raises(StructureError, match="SEQRES of chain 'A' announces 2 residues and lists 1"):
        entry(text, "9xyz.pdb")
