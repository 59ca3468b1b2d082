"""Chains of mmCIF: sequence and gaps, altlocs, author and label ids, predicted structures."""

import textwrap

import numpy as np
import pytest
from structure_files import Atom, mmcif, numbered, pdb, residue, rows

from proteingpt.data.structure import StructureError


def test_a_gap_keeps_its_letters_and_has_nan_coordinates(entry):
    atoms = residue("GLY", 1) + residue("TRP", 4)
    protein = entry(mmcif(atoms, {"1": numbered("GLY", "ALA", "SER", "TRP", "LEU")})).protein()
    assert protein.sequence == "GASWL"
    np.testing.assert_array_equal(protein.backbone, rows(1, 0, 0, 4, 0))
    assert protein.backbone.dtype == np.float32
    assert (protein.id, protein.chain, protein.confidence) == ("9xyz", "A", None)


def test_one_unresolved_atom_is_nan_alone(entry):
    atoms = residue("GLY", 1) + residue("ALA", 2, names=("N", "CA"))
    protein = entry(mmcif(atoms, {"1": numbered("GLY", "ALA")})).protein()
    assert np.isfinite(protein.backbone[1, :2]).all() and np.isnan(protein.backbone[1, 2]).all()
    assert protein.resolved.tolist() == [True, False]


def test_modified_residues_take_the_letter_of_their_parent(entry):
    """MSE by the component dictionary, the invented Q9Z by the file's own word, the chromophore CRO by none: X."""
    names = ("MSE", "Q9Z", "CRO", "ACE", "GLY")
    head = """
    loop_
    _pdbx_struct_mod_residue.id
    _pdbx_struct_mod_residue.label_comp_id
    _pdbx_struct_mod_residue.parent_comp_id
    1 Q9Z LYS
    2 CRO THR
    3 CRO TYR
    4 CRO GLY
    """
    atoms = [a for place, name in numbered(*names) for a in residue(name, place, hetero=True)]
    protein = entry(mmcif(atoms, {"1": numbered(*names)}, textwrap.dedent(head))).protein()
    assert protein.sequence == "MKXXG"
    np.testing.assert_array_equal(protein.backbone, rows(1, 2, 3, 4, 5))


def test_the_bracketed_one_letter_code_serves_where_entity_poly_seq_is_absent(entry):
    text = mmcif(residue("ALA", 3), {})
    text = text[: text.index("loop_")] + text[text.rindex("loop_") :]
    text += "_entity_poly.entity_id 1\n_entity_poly.type 'polypeptide(L)'\n"
    text += "_entity_poly.pdbx_seq_one_letter_code\n;G(MSE)\nAK\n;\n"
    protein = entry(text).protein()
    assert protein.sequence == "GMAK"
    np.testing.assert_array_equal(protein.backbone, rows(0, 0, 3, 0))


def test_of_a_microheterogeneity_the_first_component_gives_letter_and_coordinates(entry):
    """Although the second has the larger occupancy."""
    second = residue("THR", 2, altloc="B", occupancy=0.7, shift=0.25)
    atoms = residue("GLY", 1) + residue("SER", 2, altloc="A", occupancy=0.3) + second
    protein = entry(mmcif(atoms, {"1": [(1, "GLY"), (2, "SER"), (2, "THR")]})).protein()
    assert protein.sequence == "GS"
    np.testing.assert_array_equal(protein.backbone, rows(1, 2))


def test_only_the_first_model_is_read_and_all_are_counted(entry):
    atoms = residue("GLY", 1, model=3) + residue("GLY", 1, model=7, shift=0.5) + residue("ALA", 2, model=7)
    read = entry(mmcif(atoms, {"1": numbered("GLY", "ALA")}))
    np.testing.assert_array_equal(read.protein().backbone, rows(1, 0))
    assert read.facts.num_models == 2


def test_without_label_seq_id_the_observed_residues_are_the_sequence(entry):
    """As refinement programs write: author numbers, an insertion code, a water."""
    atoms = residue("GLY", 1, 60) + residue("ALA", 2, 60, code="A") + residue("HOH", 3, 900, names=("O",))
    text = mmcif(atoms, {})
    text = text[: text.index("loop_")] + text[text.rindex("loop_") :]
    text = text.replace("_atom_site.label_seq_id", "_atom_site.something_else")
    protein = entry(text).protein()
    assert protein.sequence == "GA"
    np.testing.assert_array_equal(protein.backbone, rows(1, 2))




@pytest.mark.parametrize("kind", ["mmcif", "pdb"])
@pytest.mark.parametrize(("labels", "occupancies", "kept"), [
    (("A", "B"), (0.4, 0.6), 1),
    (("1", "2"), (0.6, 0.4), 0),
    (("2", "1"), (0.3, 0.7), 1),
    (("B", "A"), (0.5, 0.5), 0),
])  # fmt: skip
def test_one_altloc_per_residue_by_occupancy_ties_to_the_first(entry, kind, labels, occupancies, kept):
    """Letters and digits alike: a residue whose altlocs are digits must not vanish."""
    both = zip(residue("ALA", 2, altloc=labels[0], occupancy=occupancies[0]),
               residue("ALA", 2, altloc=labels[1], occupancy=occupancies[1], shift=0.25), strict=True)  # fmt: skip
    atoms = residue("GLY", 1) + [atom for pair in both for atom in pair]
    names = ("GLY", "ALA")
    if kind == "mmcif":
        protein = entry(mmcif(atoms, {"1": numbered(*names)})).protein()
    else:
        protein = entry(pdb(atoms, {"A": names}), "9xyz.pdb").protein()
    expected = rows(1, 2)
    expected[1, :, 0] += 0.25 * kept
    np.testing.assert_array_equal(protein.backbone, expected)


def test_the_occupancy_is_summed_over_the_residue_not_compared_atom_by_atom(entry):
    """A: 0.4 + 0.4 + 0.8 = 1.6, B: 0.6 + 0.6 + 0.2 = 1.4: all three atoms come from A."""
    first = residue("ALA", 1, altloc="A", occupancy=0.4)
    second = residue("ALA", 1, altloc="B", occupancy=0.6, shift=0.25)
    first[2].occupancy, second[2].occupancy = 0.8, 0.2
    protein = entry(mmcif(first + second, {"1": numbered("ALA")})).protein()
    np.testing.assert_array_equal(protein.backbone, rows(1))


def test_an_altloc_without_backbone_does_not_displace_one_that_has_it(entry):
    side_chain = residue("SER", 1, names=("CB", "OG"), altloc="B", occupancy=0.9)
    atoms = residue("SER", 1, altloc="A", occupancy=0.1) + side_chain
    np.testing.assert_array_equal(entry(mmcif(atoms, {"1": numbered("SER")})).protein().backbone, rows(1))


def test_zero_occupancy_keeps_coordinates(entry):
    protein = entry(mmcif(residue("ALA", 1, occupancy=0.0), {"1": numbered("ALA")})).protein()
    np.testing.assert_array_equal(protein.backbone, rows(1))




def two_chains():
    """Author chain A is label C, and author chain B is label A: nothing may be found under the other's name."""
    a = residue("GLY", 1, chain="A", label="C")
    b = residue("ALA", 1, chain="B", label="A", entity="2")
    dna = [Atom("P", "DA", 1, 1, chain="D", label="D", entity="3")]
    ligand = [Atom("CA", "CA", 0, 500, chain="A", label="E", entity="4", hetero=True)]
    sequences = {"1": numbered("GLY"), "2": numbered("ALA"), "3": numbered("DA")}
    return mmcif(a + b + dna + ligand, sequences, types={"3": "polydeoxyribonucleotide"})


def test_author_ids_by_default_label_ids_when_asked_for(entry):
    read = entry(two_chains())
    assert read.chains == ("A", "B")
    assert read.protein("A").sequence == "G"
    assert read.protein("label:A").sequence == "A"
    assert read.protein("label:A").chain == "B"
    assert (read.facts.num_chains, read.facts.num_polymer_entities) == (3, 3)


def test_a_missing_chain_names_the_chains_there_are(entry):
    with pytest.raises(StructureError, match=r"9xyz\.cif: no polymer chain 'Z'; the polypeptide chains are: A, B$"):
        entry(two_chains()).protein("Z")
    with pytest.raises(StructureError, match=r"no polymer chain 'label:Z'; the polypeptide chains are: C, A$"):
        entry(two_chains()).protein("label:Z")


def test_a_nucleic_chain_is_refused_and_the_polypeptides_named(entry):
    with pytest.raises(StructureError, match=r"chain 'D' is not a polypeptide; the polypeptide chains are: A, B$"):
        entry(two_chains()).protein("D")


def test_label_ids_are_refused_where_the_format_has_none(entry):
    with pytest.raises(StructureError, match="no label ids"):
        entry(pdb(residue("GLY", 1)), "x.pdb").protein("label:A")


@pytest.mark.parametrize("names", [("CA",), ("N", "CA")])
def test_a_chain_without_one_complete_backbone_is_refused(entry, names):
    atoms = residue("GLY", 1, names=names) + residue("ALA", 2, names=names)
    with pytest.raises(StructureError, match="no complete backbone in chain 'A': none of its 2 residues"):
        entry(mmcif(atoms, {"1": numbered("GLY", "ALA")})).protein()


def test_a_calcium_is_not_an_alpha_carbon(entry):
    calcium = Atom("CA", " CA", 0, 3, hetero=True)
    atoms = residue("GLY", 1, names=("N", "C")) + residue("ALA", 2) + [calcium]
    protein = entry(pdb(atoms, {"A": ("GLY", "ALA")}), "9xyz.pdb").protein()
    assert protein.resolved.tolist() == [False, True]



QA_METRIC = """
loop_
_ma_qa_metric.id
_ma_qa_metric.mode
_ma_qa_metric.name
_ma_qa_metric.type
1 global pLDDT pLDDT
2 local pLDDT pLDDT
"""


def test_plddt_of_a_predicted_structure_is_its_confidence(entry):
    atoms = residue("GLY", 1, b=91.5) + residue("ALA", 2, b=40.25)
    names = ("GLY", "ALA", "SER")
    read = entry(mmcif(atoms, {"1": numbered(*names)}, QA_METRIC))
    np.testing.assert_allclose(read.protein().confidence, [0.915, 0.4025, 0.0], rtol=1e-6)
    assert read.protein().confidence.dtype == np.float32
    old = entry(pdb(atoms, {"A": names}, "TITLE     ALPHAFOLD MONOMER V2.0 PREDICTION FOR X"), "x.pdb")
    np.testing.assert_allclose(old.protein().confidence, [0.915, 0.4025, 0.0], rtol=1e-6)


def test_an_experimental_entry_that_names_alphafold_is_not_a_prediction(entry):
    head = QA_METRIC + "_exptl.method 'X-RAY DIFFRACTION'\n"
    assert entry(mmcif(residue("GLY", 1), {"1": numbered("GLY")}, head)).protein().confidence is None
    old = "EXPDTA    X-RAY DIFFRACTION\nREMARK 200 STARTING MODEL: ALPHAFOLD"
    assert entry(pdb(residue("GLY", 1), None, old), "x.pdb").protein().confidence is None


def test_the_name_of_the_file_does_not_make_a_prediction(entry):
    assert entry(pdb(residue("GLY", 1)), "AF-P29373-F1.pdb").protein().confidence is None


def test_a_prediction_without_plddt_in_its_b_factors_is_refused(entry):
    with pytest.raises(StructureError, match="B factors go from 150 to 150; wanted its pLDDT there, in 0 to 100"):
        entry(mmcif(residue("GLY", 1, b=150.0), {"1": numbered("GLY")}, QA_METRIC)).protein()
