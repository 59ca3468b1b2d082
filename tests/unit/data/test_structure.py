"""Reading structure files, on entries of a few residues whose every coordinate is known by construction.

In them residue k (its place in the deposited sequence, from 1) has N at (k, 0, 0), CA at (k, 1, 0), C at (k, 2, 0), so
that an atom's position says where it belongs; neighbours are bonded (C-N 2.2 angstrom), not so across a gap (2.8).
"""

import gzip
import io
import textwrap

import numpy as np
import pytest
from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory, BinaryCIFColumn, BinaryCIFFile, CIFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.data.structure import STRUCTURE_SUFFIXES, StructureError, find_structures, read_entry

NAMES = ("N", "CA", "C")


class Atom:
    """One atom as a file states it; `place` is the label_seq_id (0: a ligand), `number` the author's."""

    def __init__(self, name, component, place, number, code="", altloc="", occupancy=1.0, shift=0.0, b=20.0,
                 chain="A", label="A", entity="1", model=1, hetero=False):  # fmt: skip
        self.__dict__.update(locals())
        y = NAMES.index(name) if name in NAMES else 5
        self.position = (place + shift, float(y), 0.0)


def residue(component, place, number=None, names=NAMES, **more):
    return [Atom(name, component, place, place if number is None else number, **more) for name in names]


def mmcif(atoms, sequences, head="", types=None):
    """sequences: {entity: [(number, component), ...]}, microheterogeneity as a number given twice."""
    lines = ["data_9XYZ", "_entry.id 9XYZ", head.strip(), "loop_", "_entity_poly.entity_id", "_entity_poly.type"]
    lines += [f"{entity} '{(types or {}).get(entity, 'polypeptide(L)')}'" for entity in sequences]
    lines += ["loop_", "_entity_poly_seq.entity_id", "_entity_poly_seq.num", "_entity_poly_seq.mon_id"]
    lines += [f"{entity} {number} {name}" for entity, residues in sequences.items() for number, name in residues]
    columns = "group_PDB id label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id "
    columns += "pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_asym_id "
    columns += "pdbx_PDB_model_num"
    lines += ["loop_", *(f"_atom_site.{name}" for name in columns.split())]
    for serial, a in enumerate(atoms, start=1):
        x, y, z = a.position
        lines.append(
            f"{'HETATM' if a.hetero else 'ATOM'} {serial} {a.name} {a.altloc or '.'} {a.component} {a.label} "
            f"{a.entity} {a.place or '.'} {a.code or '?'} {x:.3f} {y:.3f} {z:.3f} {a.occupancy:.2f} {a.b:.2f} "
            f"{a.number} {a.chain} {a.model}"
        )
    return "\n".join(line for line in lines if line) + "\n"


def pdb_atom(serial, a):
    x, y, z = a.position
    record = "HETATM" if a.hetero else "ATOM"
    return (
        f"{record:<6}{serial:>5}  {a.name:<3}{a.altloc or ' '}{a.component:>3} {a.chain}{a.number:>4}{a.code or ' '}   "
        f"{x:8.3f}{y:8.3f}{z:8.3f}{a.occupancy:6.2f}{a.b:6.2f}          {a.name[0]:>2}"
    )


def pdb(atoms, seqres=None, head=""):
    lines = textwrap.dedent(head).strip("\n").splitlines()
    for chain, names in (seqres or {}).items():
        lines.append(f"SEQRES   1 {chain} {len(names):>4}  {' '.join(names)}")
    lines += [pdb_atom(serial, atom) for serial, atom in enumerate(atoms, start=1)]
    return "\n".join([*lines, "END", ""])


def as_bcif(text):
    """The same categories as BinaryCIF, numbers as numbers and masks as masks, through biotite."""
    categories = {}
    for name, category in next(iter(CIFFile.read(io.StringIO(text)).values())).items():
        columns = {}
        for key, column in category.items():
            mask = None if column.mask is None else column.mask.array
            is_float = key.startswith("Cartn") or key == "occupancy"
            dtype = np.float32 if is_float else np.int32 if key in ("label_seq_id", "num", "id") else str
            try:
                columns[key] = BinaryCIFColumn(column.as_array(dtype), mask)
            except ValueError:
                columns[key] = BinaryCIFColumn(column.as_array(str), mask)
        categories[name] = BinaryCIFCategory(columns)
    file = BinaryCIFFile({"9XYZ": BinaryCIFBlock(categories)})
    buffer = io.BytesIO()
    file.write(buffer)
    return buffer.getvalue()


@pytest.fixture
def entry(tmp_path):
    def write_and_read(content, name="9xyz.cif"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_entry(path)

    return write_and_read


def rows(*places):
    """Backbone with those places (from 1) resolved at their own positions, 0 standing for an unresolved residue."""
    expected = np.full((len(places), 3, 3), np.nan, dtype=np.float32)
    for row, place in enumerate(places):
        if place:
            expected[row] = [[place, 0, 0], [place, 1, 0], [place, 2, 0]]
    return expected


def numbered(*names):
    return list(enumerate(names, start=1))


# ------------------------------------------------------------------------------------------------ sequence and gaps


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


# ---------------------------------------------------------------------------------------------------------- altlocs


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


# ------------------------------------------------------------------------------------------------------------ chains


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


# -------------------------------------------------------------------------------------------------------- PDB format


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


# ------------------------------------------------------------------------------------------------ formats agree


def everything():
    """Gap, altlocs, insertion code, MSE, two chains: every feature that all formats can express."""
    atoms = residue("MSE", 1, 59, hetero=True) + residue("TYR", 2, 60) + residue("PRO", 3, 60, code="A")
    atoms += residue("ALA", 5, 62, altloc="1", occupancy=0.4, shift=0.25)
    atoms += residue("ALA", 5, 62, altloc="2", occupancy=0.6)
    second = dict(chain="B", label="B", entity="2")
    atoms += residue("GLY", 1, 1, **second) + residue("ALA", 2, 2, **second)
    sequences = {"1": ("MSE", "TYR", "PRO", "GLY", "ALA"), "2": ("GLY", "ALA")}
    text = mmcif(atoms, {entity: numbered(*names) for entity, names in sequences.items()})
    return text, pdb(atoms, {"A": sequences["1"], "B": sequences["2"]})


def test_mmcif_binarycif_and_pdb_of_one_entry_give_equal_proteins(entry):
    cif, old = everything()
    contents = {"a.cif": cif, "a.bcif": as_bcif(cif), "9xyz.pdb": old}
    contents |= {f"{name}.gz": gzip.compress(c if isinstance(c, bytes) else c.encode()) for name, c in contents.items()}
    for name, content in contents.items():
        read = entry(content, name)
        assert (read.id, read.chains) == ("9xyz", ("A", "B")), name
        assert read.protein("A").sequence == "MYPGA", name
        np.testing.assert_array_equal(read.protein("A").backbone, rows(1, 2, 3, 0, 5), err_msg=name)
        np.testing.assert_array_equal(read.protein("B").backbone, rows(1, 2), err_msg=name)


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"),
    lambda text: "\ufeff# a comment\n\n" + text,
    lambda text: text.replace(" MSE ", " 'MSE' ").replace(" CA ", ' "CA" '),
    lambda text: text.replace("\n_", "\n  _").replace("\nATOM", "\n  ATOM"),
    lambda text: text.replace("data_9XYZ", "data_9XYZ\n_struct.title\n;first line\n_atom_site.id of a trap\nloop_\n;"),
    lambda text: text + "data_comp_XYZ\n_chem_comp.id XYZ\n",
    lambda text: text.replace("ATOM 4 ", "ATOM\n4 "),
])  # fmt: skip
def test_spelling_does_not_change_the_protein(entry, change):
    """Line ends, byte-order mark, quotes, indentation, text fields that look like categories, a second block."""
    protein = entry(change(everything()[0])).protein()
    assert protein.sequence == "MYPGA"
    np.testing.assert_array_equal(protein.backbone, rows(1, 2, 3, 0, 5))


def test_the_format_is_told_by_content_not_by_name(entry):
    assert entry(everything()[0], "wrong.pdb").protein().sequence == "MYPGA"
    assert entry(everything()[1], "wrong.cif").protein().sequence == "MYPGA"


# ----------------------------------------------------------------------------------------------- predicted structures

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


# ------------------------------------------------------------------------------------------------------------- facts


def test_facts_of_mmcif_as_deposited(entry):
    head = textwrap.dedent("""
    _struct.title 'A small invention'
    _struct_keywords.pdbx_keywords 'TRANSPORT PROTEIN'
    _struct_keywords.text 'fatty acid binding, Beta barrel, TRANSPORT PROTEIN'
    _refine.ls_d_res_high 1.80
    _pdbx_database_status.recvd_initial_deposition_date 1994-09-28
    loop_
    _exptl.entry_id
    _exptl.method
    9XYZ 'X-RAY DIFFRACTION'
    9XYZ 'NEUTRON DIFFRACTION'
    loop_
    _entity_src_gen.entity_id
    _entity_src_gen.pdbx_gene_src_scientific_name
    2 'Escherichia coli'
    3 'Homo sapiens'
    _entity_src_nat.entity_id 1
    _entity_src_nat.pdbx_organism_scientific 'Homo sapiens'
    """)
    facts = entry(mmcif(residue("GLY", 1), {"1": numbered("GLY")}, head)).facts
    assert facts.title == "A small invention"
    assert facts.keywords == ("TRANSPORT PROTEIN", "fatty acid binding", "Beta barrel")
    assert facts.methods == ("X-RAY DIFFRACTION", "NEUTRON DIFFRACTION")
    assert (facts.resolution, facts.year, facts.num_models) == (1.8, 1994, 1)
    assert facts.organisms == ("Homo sapiens", "Escherichia coli")
    assert (facts.num_chains, facts.num_polymer_entities) == (1, 1)


PDB_HEAD = """
HEADER    RETINOIC-ACID TRANSPORT                 28-SEP-94   1CBS
TITLE     CRYSTAL STRUCTURE OF CELLULAR RETINOIC-ACID-
TITLE    2 BINDING PROTEINS
COMPND    MOL_ID: 1;
COMPND   2 MOLECULE: ONE;
COMPND   3 CHAIN: A;
COMPND   4 MOL_ID: 2;
COMPND   5 CHAIN: B
SOURCE    MOL_ID: 1;
SOURCE   2 ORGANISM_SCIENTIFIC: HOMO SAPIENS;
SOURCE   3 MOL_ID: 2;
SOURCE   4 ORGANISM_SCIENTIFIC: ESCHERICHIA
SOURCE   5 COLI
KEYWDS    RETINOIC-ACID TRANSPORT, LIPID-BINDING
EXPDTA    X-RAY DIFFRACTION; NEUTRON DIFFRACTION
REMARK   2
REMARK   2 RESOLUTION.    1.80 ANGSTROMS.
"""


def test_facts_of_pdb_format(entry):
    atoms = residue("GLY", 1) + residue("ALA", 1, chain="B")
    read = entry(pdb(atoms, {"A": ("GLY",), "B": ("ALA",)}, PDB_HEAD), "some.ent")
    facts = read.facts
    assert read.id == "1cbs"
    assert facts.title == "CRYSTAL STRUCTURE OF CELLULAR RETINOIC-ACID-BINDING PROTEINS"
    assert facts.keywords == ("RETINOIC-ACID TRANSPORT", "LIPID-BINDING")
    assert facts.methods == ("X-RAY DIFFRACTION", "NEUTRON DIFFRACTION")
    assert (facts.resolution, facts.year, facts.num_models) == (1.8, 1994, 1)
    assert facts.organisms == ("HOMO SAPIENS", "ESCHERICHIA COLI")
    assert (facts.num_chains, facts.num_polymer_entities) == (2, 2)


def test_a_file_that_says_nothing_gives_empty_facts_and_the_stem_as_id(entry):
    read = entry(pdb(residue("GLY", 1)), "My-Model_3.pdb")
    assert read.id == "my-model_3"
    facts = read.facts
    assert (facts.title, facts.keywords, facts.methods, facts.resolution) == (None, (), (), None)
    assert (facts.organisms, facts.year, facts.num_polymer_entities) == ((), None, None)


# ------------------------------------------------------------------------------------------------------------ damage


def refused(entry, content, name, *said):
    with pytest.raises(StructureError) as caught:
        entry(content, name).protein()
    for part in (name, *said):
        assert part in str(caught.value)


@pytest.mark.parametrize(("content", "name", "said"), [
    (b"", "a.cif", "the file is empty"),
    (b" \n\n", "a.pdb", "the file is empty"),
    (bytes(range(256)) * 20, "a.pdb", "binary content"),
    (b"\x00\x01\x02" * 100, "a.bcif", "not a whole BinaryCIF"),
    (b"\x83\xa7encoder\xadsomething\xaadataBlocks\xdd\xff\xff", "a.bcif", "cannot be read"),
    (b"<html>not found</html>", "a.cif", "neither mmCIF"),
    (b"data_x\n_cell.length_a 3\n", "a.cif", "no atom_site category"),
    (b"HEADER    HYDROLASE\nTITLE     NOTHING ELSE\n", "a.pdb", "no ATOM or HETATM record"),
    (gzip.compress(b"data_x\n" * 5000)[:-20], "a.cif.gz", "damaged or truncated gzip"),
    (b"\x1f\x8b\x08 and then rubbish", "a.cif.gz", "gzip"),
])  # fmt: skip
def test_what_is_no_structure_is_refused_with_its_reason(entry, content, name, said):
    refused(entry, content, name, said)


def test_a_path_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(StructureError, match="nowhere.cif: cannot be opened: No such file"):
        read_entry(tmp_path / "nowhere.cif")
    with pytest.raises(StructureError, match="cannot be opened: Is a directory"):
        read_entry(tmp_path)


def test_an_mmcif_cut_inside_a_row_is_refused(entry):
    text = everything()[0]
    last_rows = text.rstrip().rsplit(" ", 3)[0]
    refused(entry, last_rows, "a.cif", "ends inside a row")


def test_an_mmcif_cut_between_rows_is_told_by_its_missing_category_end(entry):
    """The archives end each category with `#`; a cut after a whole row leaves the last one open."""
    head = "".join(f"_invented_{i}.id 1\n#\n" for i in range(10))
    text = mmcif(residue("GLY", 1) + residue("ALA", 2), {"1": numbered("GLY", "ALA")}, head)
    text = text.replace("9XYZ\n", "9XYZ\n#\n").replace("\nloop_\n_", "\n#\nloop_\n_").replace("#\n#\n", "#\n") + "#\n"
    assert entry(text).protein().resolved.all()
    cut = text.rstrip("#\n").rsplit("\n", 1)[0] + "\n"
    refused(entry, cut, "a.cif", "truncated: every category is closed by a # line except the last")


def test_an_mmcif_cut_inside_a_text_field_is_refused(entry):
    refused(entry, everything()[0] + "_struct.title\n;goes on and", "a.cif", "ends inside a text field")


def test_a_pdb_file_that_complies_with_the_format_and_has_no_end_is_refused(entry):
    head = "REMARK   4 9XYZ COMPLIES WITH FORMAT V. 3.30, 13-JUL-11"
    text = pdb(residue("GLY", 1), None, head)
    assert entry(text, "a.pdb").protein().sequence == "G"
    refused(entry, text.replace("END\n", ""), "a.pdb", "END record is missing")


@pytest.mark.parametrize(("old", "new", "said"), [
    (" 5.000 0.000 0.000 ", " 5.0oo 0.000 0.000 ", "Cartn_x holds a broken number"),
    (" 5.000 0.000 0.000 ", " inf 0.000 0.000 ", "beyond reason"),
    (" 5.000 0.000 0.000 ", " 5e30 0.000 0.000 ", "beyond reason"),
    (" A 1 5 ? ", " A 1 77777777777777777777777 ? ", "broken number"),
    (" A 1 5 ? ", " A 1 2000000000 ? ", "places residue 2000000000"),
    ("_atom_site.Cartn_y\n", "", "ends inside a row"),
    ("_atom_site.Cartn_y", "_atom_site.Cartn_u", "no column Cartn_y"),
    ("_entity_poly_seq.num", "_entity_poly_seq.hmm", "entity_poly_seq.num"),
    ("1 3 PRO\n", "1 3\n", "entity_poly_seq cannot be parsed"),
])  # fmt: skip
def test_broken_tables_are_refused_by_name(entry, old, new, said):
    text = everything()[0]
    assert old in text
    refused(entry, text.replace(old, new), "a.cif", said)


@pytest.mark.parametrize(("old", "new", "said"), [
    ("   5.000   0.000", "   5.0x0   0.000", "broken number for x"),
    ("   5.000   0.000", "     nan   0.000", "x is nan"),
    ("  0.40 20.00", "  0.4. 20.00", "broken number for occupancy"),
    ("ALA A  62 ", "ALA A  6? ", "residue number '6?'"),
])  # fmt: skip
def test_broken_pdb_numbers_are_refused_by_name(entry, old, new, said):
    text = everything()[1]
    assert old in text
    refused(entry, text.replace(old, new), "a.pdb", said)


def test_a_length_beyond_reason_in_binarycif_is_refused_before_it_is_allocated(entry):
    """The row count of atom_site, a MessagePack integer, overwritten by 2^31 - 1."""
    content = as_bcif(everything()[0])
    num_atoms = sum(line.startswith(("ATOM", "HETATM")) for line in everything()[0].splitlines())
    assert num_atoms < 128
    old = b"\xa8rowCount" + bytes([num_atoms])
    assert old in content
    refused(entry, content.replace(old, b"\xa8rowCount\xce\x7f\xff\xff\xff"), "a.bcif", "rowCount is 2147483647")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_raises_anything_but_structure_error(tmp_path_factory, data):
    """Any of the three formats, cut anywhere or with bytes overwritten: a protein or a StructureError."""
    cif, old = everything()
    content = bytearray(data.draw(st.sampled_from([cif.encode(), as_bcif(cif), old.encode()])))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "x"
    path.write_bytes(bytes(content))
    try:
        read = read_entry(path)
        for chain in read.chains:
            read.protein(chain)
    except StructureError as error:
        assert str(path) in str(error)


# ------------------------------------------------------------------------------------------------------------- files


def test_structures_are_found_flat_and_in_sub_folders_sorted(tmp_path):
    wanted = ["cb/1cbs.cif.gz", "ab/2ABC.PDB", "pdb1abc.ent.gz", "x.bcif", "y.mmcif", "z.pdbx"]
    for name in [*wanted, "manifest.tsv", "1cbs.cif.bak", "cif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_structures(tmp_path) == sorted(tmp_path / name for name in wanted)
    assert ".bcif.gz" in STRUCTURE_SUFFIXES


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StructureError, match="nothing: not a directory"):
        find_structures(tmp_path / "nothing")
