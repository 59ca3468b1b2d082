"""Facts of an entry, against what was written into the file by hand."""

import textwrap
from dataclasses import replace

import pytest
from structure_files import Atom, as_bcif, mmcif, numbered, pdb, residue

from proteingpt.protein import Facts

WHOLE_HEAD = """
_struct.title 'A small invention'
_struct_keywords.pdbx_keywords 'TRANSPORT PROTEIN/DNA'
_struct_keywords.text 'fatty acid binding, Beta barrel, Transport Protein/DNA'
_refine.ls_d_res_high 1.80
_pdbx_database_status.recvd_initial_deposition_date 1994-09-28
loop_
_exptl.entry_id
_exptl.method
9XYZ 'X-RAY DIFFRACTION'
9XYZ 'NEUTRON DIFFRACTION'
loop_
_citation.id
_citation.year
1 1991
primary 1995
loop_
_diffrn_radiation_wavelength.id
_diffrn_radiation_wavelength.wavelength
1 0.9790
2 0.9793
3 .
_diffrn_source.diffrn_id 1
_diffrn_source.pdbx_wavelength ?
_diffrn_source.pdbx_wavelength_list '0.9537, 0.97935, 1.5-2.5'
loop_
_software.name
_software.pdbx_ordinal
X-PLOR 1
'phenix.refine' 2
X-PLOR 3
? 4
_pdbx_nmr_software.name Sparky
_pdbx_nmr_software.ordinal 1
loop_
_entity.id
_entity.type
_entity.formula_weight
1 polymer 120.5
2 polymer 300
3 polymer 310.25
4 non-polymer 65.41
5 non-polymer ?
6 branched 424.387
7 water 18.015
loop_
_struct_asym.id
_struct_asym.entity_id
A 1
B 1
C 2
D 3
E 4
F 5
G 6
H 7
_pdbx_entity_branch.entity_id 6
_pdbx_entity_branch.type oligosaccharide
loop_
_pdbx_poly_seq_scheme.asym_id
_pdbx_poly_seq_scheme.seq_id
_pdbx_poly_seq_scheme.mon_id
_pdbx_poly_seq_scheme.auth_seq_num
A 1 GLY 1
A 2 ALA ?
A 2 SER ?
B 1 GLY 1
B 2 ALA 2
loop_
_pdbx_struct_assembly.id
_pdbx_struct_assembly.details
1 'complete icosahedral assembly'
2 'icosahedral asymmetric unit'
3 author_defined_assembly
loop_
_struct_conn.id
_struct_conn.conn_type_id
_struct_conn.ptnr1_label_asym_id
_struct_conn.ptnr1_label_comp_id
_struct_conn.ptnr2_label_asym_id
_struct_conn.ptnr2_label_comp_id
disulf1 disulf A CYS B CYS
covale1 covale A GLY G NAG
covale2 covale A ALA B GLY
metalc1 metalc E ZN A GLY
metalc2 metalc A HIS E ZN
metalc3 metalc H HOH F UNX
hydrog1 hydrog C DA D U
loop_
_struct_mon_prot_cis.pdbx_id
_struct_mon_prot_cis.label_asym_id
_struct_mon_prot_cis.label_seq_id
_struct_mon_prot_cis.pdbx_label_asym_id_2
_struct_mon_prot_cis.pdbx_label_seq_id_2
1 A 1 A 2
2 A 1 B 2
loop_
_entity_src_gen.entity_id
_entity_src_gen.pdbx_gene_src_scientific_name
2 'Escherichia coli'
3 'Homo sapiens'
_entity_src_nat.entity_id 1
_entity_src_nat.pdbx_organism_scientific 'Homo sapiens'
"""

WHOLE_FACTS = Facts(
    title="A small invention",
    keywords=("fatty acid binding", "Beta barrel"),
    classification="TRANSPORT PROTEIN/DNA",
    methods=("X-RAY DIFFRACTION", "NEUTRON DIFFRACTION"),
    methodology="experimental",
    resolution=1.8,
    wavelength=0.9794,
    organisms=("Homo sapiens", "Escherichia coli"),
    year=1994,
    publication_year=1995,
    software=("PHENIX.REFINE", "SPARKY", "X-PLOR"),
    molecular_weight=1.34,  # 2 * 120.5 + 300 + 310.25 + 65.41 + 424.387 = 1341.047 Da
    num_models=1,
    num_assemblies=2,
    num_chains=4,
    num_entities=7,
    num_polymer_entities=3,
    num_nonpolymer_entities=2,
    num_branched_entities=1,
    num_solvent_entities=1,
    num_dna_entities=1,
    num_rna_entities=1,
    num_hybrid_entities=0,
    num_nucleic_acid_entities=2,
    num_heavy_atoms=14,
    num_hydrogen_atoms=2,
    num_solvent_atoms=1,
    num_polymer_monomers=5,
    num_unmodeled_monomers=2,
    num_covalent_bonds=2,
    num_metal_bonds=3,
    num_cis_peptides=1,
    polymer_composition="protein/NA/oligosaccharide",
    polymer_type="Other",
    nucleic_acid_type="Other",
    nonpolymer_components=("UNX", "ZN"),
)


def whole_atoms():
    """Three residues of protein, one of DNA, one of RNA, zinc, an unknown atom, a sugar's atom, deuterated water."""
    atoms = residue("GLY", 1) + residue("GLY", 1, chain="B", label="B") + residue("ALA", 2, chain="B", label="B")
    atoms += [Atom("P", "DA", 1, 1, chain="C", label="C", entity="2")]
    atoms += [Atom("P", "U", 1, 1, chain="D", label="D", entity="3")]
    atoms += [Atom("ZN", "ZN", 0, 1, label="E", entity="4"), Atom("UNK", "UNX", 0, 2, label="F", entity="5")]
    return atoms + [Atom(name, "DOD", 0, 3, label="H", entity="7") for name in ("O", "D1", "D2")]


def symbol(atom):
    return {"CA": "C", "ZN": "ZN", "UNK": "X", "D1": "D", "D2": "D"}.get(atom.name, atom.name)


def with_symbols(text, atoms):
    """type_symbol as one more column, put last."""
    head, tail = text.split("_atom_site.pdbx_PDB_model_num\n")
    lines = tail.splitlines()
    named = [f"{line} {symbol(atom)}" for line, atom in zip(lines, atoms, strict=True)]
    return head + "_atom_site.pdbx_PDB_model_num\n_atom_site.type_symbol\n" + "\n".join(named) + "\n"


def whole():
    atoms = whole_atoms()
    sequences = {"1": numbered("GLY", "ALA"), "2": numbered("DA"), "3": numbered("U")}
    types = {"2": "polydeoxyribonucleotide", "3": "polyribonucleotide"}
    return with_symbols(mmcif(atoms, sequences, WHOLE_HEAD, types), atoms)


@pytest.mark.parametrize("kind", ["mmcif", "binarycif"])
def test_every_fact_of_a_whole_entry(entry, kind):
    content = whole() if kind == "mmcif" else as_bcif(whole())
    assert entry(content, "a.cif").facts == WHOLE_FACTS


def test_of_a_whole_entry_an_absent_category_means_none(entry):
    text = whole()
    for name in ("struct_conn", "struct_mon_prot_cis", "pdbx_entity_branch", "pdbx_struct_assembly"):
        text = text.replace(f"_{name}.", f"_invented_{name}.")
    assert entry(text).facts == replace(
        WHOLE_FACTS,
        num_covalent_bonds=0,
        num_metal_bonds=0,
        nonpolymer_components=(),
        num_cis_peptides=0,
        num_assemblies=1,
        polymer_composition="protein/NA",
        polymer_type="Protein/NA",
    )


def test_what_a_program_left_out_is_unknown_not_zero(entry):
    facts = entry(mmcif(residue("GLY", 1), {"1": numbered("GLY")})).facts
    assert facts == Facts(
        num_models=1,
        num_chains=1,
        num_polymer_entities=1,
        num_dna_entities=0,
        num_rna_entities=0,
        num_hybrid_entities=0,
        num_nucleic_acid_entities=0,
        polymer_composition="homomeric protein",
        polymer_type="Protein (only)",
        nucleic_acid_type="Other",
    )


@pytest.mark.parametrize(("head", "num_heavy"), [
    ("", 3),
    ("_pdbx_nmr_representative.conformer_id 7\n", 2),
    ("_pdbx_nmr_ensemble.representative_conformer 7\n", 2),
    ("_pdbx_nmr_representative.conformer_id 99\n", 3),
])  # fmt: skip
def test_atoms_are_counted_in_the_representative_model(entry, head, num_heavy):
    """Three atoms in model 1, two in model 7."""
    atoms = residue("GLY", 1) + residue("GLY", 1, names=("N", "CA"), model=7)
    text = mmcif(atoms, {"1": numbered("GLY")}, "_exptl.method 'SOLUTION NMR'\n" + head)
    facts = entry(with_symbols(text, atoms)).facts
    assert (facts.num_models, facts.num_heavy_atoms, facts.num_hydrogen_atoms) == (2, num_heavy, 0)


@pytest.mark.parametrize(("head", "methodology"), [
    ("_exptl.method 'THEORETICAL MODEL'\n", "computational"),
    ("_ma_data.id 1\n", "computational"),
    ("_struct.pdbx_structure_determination_methodology computational\n", "computational"),
    ("_exptl.method 'SOLUTION NMR'\n", "experimental"),
    ("_exptl.method ?\n", None),
])  # fmt: skip
def test_methodology_by_what_the_file_states(entry, head, methodology):
    assert entry(mmcif(residue("GLY", 1), {"1": numbered("GLY")}, head)).facts.methodology == methodology


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
JRNL        AUTH   G.J.KLEYWEGT,T.BERGFORS,H.SENN,P.LE MOTTE,B.GSELL,
JRNL        REF    STRUCTURE                     V.   2  1241 1994
REMARK   1 REFERENCE 1
REMARK   1  REF    J.MOL.BIOL.                   V. 230  1225 1993
REMARK   2
REMARK   2 RESOLUTION.    1.80 ANGSTROMS.
REMARK   4 1CBS COMPLIES WITH FORMAT V. 3.30, 13-JUL-11
REMARK 200  WAVELENGTH OR RANGE        (A) : 0.9790, 0.9793,
REMARK 200                                   1.0721; 0.5-2.0
REMARK 465   M RES C SSSEQI
REMARK 465     SER A     2
CISPEP   1 GLY A    1    SER A    2          0        -0.37
"""


def pdb_facts(entry, head=PDB_HEAD):
    water = [Atom("O", "HOH", 0, 9, hetero=True), Atom("H1", "HOH", 0, 9, hetero=True)]
    atoms = residue("GLY", 1) + residue("ALA", 1, chain="B") + water
    return entry(pdb(atoms, {"A": ("GLY", "SER"), "B": ("ALA",)}, head), "some.ent")


PDB_FACTS = Facts(
    title="CRYSTAL STRUCTURE OF CELLULAR RETINOIC-ACID-BINDING PROTEINS",
    keywords=("LIPID-BINDING",),
    classification="RETINOIC-ACID TRANSPORT",
    methods=("X-RAY DIFFRACTION", "NEUTRON DIFFRACTION"),
    methodology="experimental",
    resolution=1.8,
    wavelength=1.0721,
    organisms=("HOMO SAPIENS", "ESCHERICHIA COLI"),
    year=1994,
    publication_year=1994,
    num_models=1,
    num_chains=2,
    num_dna_entities=0,
    num_rna_entities=0,
    num_hybrid_entities=0,
    num_nucleic_acid_entities=0,
    num_heavy_atoms=7,
    num_hydrogen_atoms=1,
    num_solvent_atoms=1,
    num_polymer_monomers=3,
    num_unmodeled_monomers=1,
    num_covalent_bonds=0,
    num_metal_bonds=0,
    num_cis_peptides=1,
    nonpolymer_components=(),
)


def test_pdb_format_says_what_its_records_say_and_no_more(entry):
    """Nothing of entities, assemblies, mass and programs."""
    read = pdb_facts(entry)
    assert read.id == "1cbs"
    assert read.facts == PDB_FACTS


def test_link_records_leave_the_kind_of_bond_unknown(entry):
    link = "LINK        ZN    ZN A 301                 NE2 HIS A  94     1555   1555  2.05\n"
    facts = pdb_facts(entry, PDB_HEAD + link).facts
    unknown = dict(num_covalent_bonds=None, num_metal_bonds=None, nonpolymer_components=None)
    assert facts == replace(PDB_FACTS, **unknown)


def test_a_file_that_is_not_of_the_archive_says_nothing_by_silence(entry):
    facts = pdb_facts(entry, PDB_HEAD.replace("COMPLIES", "AGREES")).facts
    counts = "dna_entities rna_entities hybrid_entities nucleic_acid_entities polymer_monomers unmodeled_monomers "
    counts += "covalent_bonds metal_bonds cis_peptides"
    unknown = {f"num_{name}": None for name in counts.split()}
    assert facts == replace(PDB_FACTS, **unknown, nonpolymer_components=None)


def test_a_classification_that_fills_its_columns_may_be_cut_and_is_left_out(entry):
    """Forty columns in HEADER; the whole text stands in mmCIF only."""
    head = "HEADER    HYDROLASE/HYDROLASE INHIBITOR/DNA COMPLE28-SEP-94   1CBS\n"
    assert entry(pdb(residue("GLY", 1), None, head), "a.pdb").facts.classification is None


def test_a_file_that_says_nothing_gives_no_facts_and_the_stem_as_id(entry):
    read = entry(pdb(residue("GLY", 1)), "My-Model_3.pdb")
    assert read.id == "my-model_3"
    counted = dict(num_models=1, num_chains=1, num_heavy_atoms=3, num_hydrogen_atoms=0, num_solvent_atoms=0)
    assert read.facts == Facts(**counted)


def test_a_prediction_in_pdb_format_is_computational(entry):
    head = textwrap.dedent("TITLE     ALPHAFOLD MONOMER V2.0 PREDICTION FOR X\n")
    assert entry(pdb(residue("GLY", 1), None, head), "a.pdb").facts.methodology == "computational"
