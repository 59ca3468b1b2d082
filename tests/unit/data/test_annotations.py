"""RCSB's answers in our types, and a folder of them as a mirror.

The answers are written by hand in the schema of RCSB's Data API; what they must become is written by hand too, or was
published (../shared/data).
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rcsb_server import SHARED_DATA, RcsbServer, make_entry

from proteingpt.data.annotations import (
    AnnotationError,
    annotation_from_rcsb,
    entry_id,
    facts_from_rcsb,
    parse_clusters,
    read_annotations,
)
from proteingpt.data.rcsb import Client
from proteingpt.protein import Facts

# Goose haemoglobin, as the Data API answers it (the parts that are asked for).
ENTRY_1HV4 = {
    "rcsb_id": "1HV4",
    "struct": {"title": "CRYSTAL STRUCTURE ANALYSIS OF BAR-HEAD GOOSE HEMOGLOBIN (DEOXY FORM)"},
    "struct_keywords": {
        "pdbx_keywords": "OXYGEN STORAGE/TRANSPORT",
        "text": "ALLOSTERIC MECHANISM,  OXYGEN TRANSPORT, HEME, oxygen storage/transport, RESPIRATORY\n PROTEIN",
    },
    "exptl": [{"method": "X-RAY DIFFRACTION"}],
    "rcsb_accession_info": {"deposit_date": "2001-01-07T00:00:00Z", "initial_release_date": "2001-01-17T00:00:00Z"},
    "rcsb_primary_citation": {"year": 2001},
    "pubmed": {"rcsb_pubmed_abstract_text": "The <i>bar-headed</i> goose\n flies high."},
    "rcsb_entry_info": {
        "assembly_count": 2,
        "branched_entity_count": 0,
        "cis_peptide_count": 0,
        "deposited_atom_count": 9288,
        "deposited_hydrogen_atom_count": 0,
        "deposited_model_count": 1,
        "deposited_polymer_entity_instance_count": 8,
        "deposited_polymer_monomer_count": 1148,
        "deposited_solvent_atom_count": 0,
        "deposited_unmodeled_polymer_monomer_count": 0,
        "diffrn_radiation_wavelength_maximum": 1.5418,
        "entity_count": 3,
        "inter_mol_covalent_bond_count": 0,
        "inter_mol_metalic_bond_count": 8,
        "molecular_weight": 131.63,
        "na_polymer_entity_types": "Other",
        "nonpolymer_bound_components": ["HEM"],
        "nonpolymer_entity_count": 1,
        "polymer_composition": "heteromeric protein",
        "polymer_entity_count": 2,
        "polymer_entity_count_DNA": 0,
        "polymer_entity_count_RNA": 0,
        "polymer_entity_count_nucleic_acid": 0,
        "polymer_entity_count_nucleic_acid_hybrid": 0,
        "resolution_combined": [2.8],
        "selected_polymer_entity_types": "Protein (only)",
        "software_programs_combined": ["CNS", "IPC", "X-GEN", "X-PLOR"],
        "solvent_entity_count": 0,
        "structure_determination_methodology": "experimental",
    },
    "polymer_entities": [
        {
            "rcsb_polymer_entity_container_identifiers": {"entity_id": "1", "auth_asym_ids": ["A", "C", "E", "G"]},
            "rcsb_entity_source_organism": [{"ncbi_scientific_name": "Anser indicus", "scientific_name": "A. indicus"}],
        },
        {
            "rcsb_polymer_entity_container_identifiers": {"entity_id": "2", "auth_asym_ids": ["B", "D", "F", "H"]},
            "rcsb_entity_source_organism": [{"ncbi_scientific_name": "Anser indicus", "scientific_name": "A. indicus"}],
        },
    ],
}

FACTS_1HV4 = Facts(
    title="CRYSTAL STRUCTURE ANALYSIS OF BAR-HEAD GOOSE HEMOGLOBIN (DEOXY FORM)",
    keywords=("ALLOSTERIC MECHANISM", "OXYGEN TRANSPORT", "HEME", "RESPIRATORY PROTEIN"),
    classification="OXYGEN STORAGE/TRANSPORT",
    methods=("X-RAY DIFFRACTION",),
    methodology="experimental",
    resolution=2.8,
    wavelength=1.5418,
    organisms=("Anser indicus",),
    year=2001,
    publication_year=2001,
    software=("CNS", "IPC", "X-GEN", "X-PLOR"),
    molecular_weight=131.63,
    num_models=1,
    num_assemblies=2,
    num_chains=8,
    num_entities=3,
    num_polymer_entities=2,
    num_nonpolymer_entities=1,
    num_branched_entities=0,
    num_solvent_entities=0,
    num_dna_entities=0,
    num_rna_entities=0,
    num_hybrid_entities=0,
    num_nucleic_acid_entities=0,
    num_heavy_atoms=9288,
    num_hydrogen_atoms=0,
    num_solvent_atoms=0,
    num_polymer_monomers=1148,
    num_unmodeled_monomers=0,
    num_covalent_bonds=0,
    num_metal_bonds=8,
    num_cis_peptides=0,
    polymer_composition="heteromeric protein",
    polymer_type="Protein (only)",
    nucleic_acid_type="Other",
    nonpolymer_components=("HEM",),
)

# What a published question asks about, as the start of the question: (field, how its answer is written).
PUBLISHED = {
    "How many assemblies": ("num_assemblies", str),
    "How many entities": ("num_entities", str),
    "How many heavy atom": ("num_heavy_atoms", str),
    "How many hydrogen atom": ("num_hydrogen_atoms", str),
    "How many model": ("num_models", str),
    "How many polymer monomers": ("num_polymer_monomers", str),
    "How many heavy solvent atom": ("num_solvent_atoms", str),
    "How many nucleic acid polymer entities": ("num_nucleic_acid_entities", str),
    "What is the radiation wavelength": ("wavelength", str),
    "How many intermolecular covalent": ("num_covalent_bonds", str),
    "How many intermolecular metalic": ("num_metal_bonds", str),
    "Does this protein contain non-polymer": ("num_nonpolymer_entities", lambda n: "YES" if n else "NO"),
    "Does this protein contain polymer": ("num_polymer_entities", lambda n: "YES" if n else "NO"),
    "Does this protein contain DNA": ("num_dna_entities", lambda n: "YES" if n else "NO"),
    "Does this protein contain RNA": ("num_rna_entities", lambda n: "YES" if n else "NO"),
    "Does this protein contain solvent": ("num_solvent_entities", lambda n: "YES" if n else "NO"),
    "Does this protein contain branched": ("num_branched_entities", lambda n: "YES" if n else "NO"),
    "Does this protein have unmodeled": ("num_unmodeled_monomers", lambda n: "YES" if n else "NO"),
    "Does this protein have hybrid": ("num_hybrid_entities", lambda n: "YES" if n else "NO"),
    "Does this protein have cis-peptide": ("num_cis_peptides", lambda n: "YES" if n else "NO"),
    "What is the polymer entity composition": ("polymer_composition", str),
    "What is the nucleic acid polymer entity type": ("nucleic_acid_type", str),
    "What are the bound nonpolymer components": ("nonpolymer_components", ", ".join),
    "What is the molecular mass": ("molecular_weight", str),
    "What is the polymer entity type": ("polymer_type", str),
    "What are the software programs": ("software", ", ".join),
    "Is this protein determined by": ("methodology", str),
    "What are the terms characterizing": ("classification", str),
    "When is this protein first published": ("publication_year", str),
}


def test_every_fact_comes_from_its_field_of_the_api():
    assert facts_from_rcsb(ENTRY_1HV4) == FACTS_1HV4
    assert None not in dataclasses.astuple(FACTS_1HV4), "a fact without a field"


@pytest.mark.skipif(not (SHARED_DATA / "proteinchat").is_dir(), reason="no ../shared/data/proteinchat")
def test_the_published_answers_of_1hv4_follow_from_the_api_answer():
    """29 of its 30 questions; the one about methods is worded by families (data/questions.py)."""
    published = json.loads((SHARED_DATA / "proteinchat" / "qa.json").read_text())["1hv4"]
    facts, compared = facts_from_rcsb(ENTRY_1HV4), 0
    for turn in published:
        for start, (field, write) in PUBLISHED.items():
            if turn["Q"].startswith(start):
                assert write(getattr(facts, field)) == str(turn["A"]), turn["Q"]
                compared += 1
    assert compared == 29


def test_an_annotation_has_abstract_release_day_and_the_entity_of_each_chain():
    annotation = annotation_from_rcsb(ENTRY_1HV4)
    assert annotation.abstract == "The bar-headed goose flies high."
    assert annotation.release_date == "2001-01-17"
    assert annotation.polymer_entities == dict(A="1", C="1", E="1", G="1", B="2", D="2", F="2", H="2")


def test_what_the_api_does_not_say_is_unknown():
    nothing = annotation_from_rcsb({"rcsb_id": "1ABC", "struct": None, "pubmed": None, "polymer_entities": None})
    assert nothing.facts == Facts()
    assert (nothing.abstract, nothing.release_date, nothing.polymer_entities) == (None, None, {})


def test_lists_that_the_api_leaves_out_of_the_entry_info_are_empty():
    facts = facts_from_rcsb({"rcsb_entry_info": {"entity_count": 1, "nonpolymer_bound_components": None}})
    assert facts.nonpolymer_components == () and facts.software == ()
    assert facts.resolution is None and facts.num_entities == 1 and facts.num_chains is None


def test_the_rest_form_writes_dna_in_small_letters():
    info = {"polymer_entity_count_dna": 2, "polymer_entity_count_rna": 0}
    facts = facts_from_rcsb({"rcsb_entry_info": info})
    assert (facts.num_dna_entities, facts.num_rna_entities) == (2, 0)


def test_a_sourceless_taxonomy_falls_back_on_the_deposited_name_and_names_come_once_in_order():
    sources = [[("Mus musculus", "MOUSE")], [(None, "Unknown phage"), ("Mus musculus", "mouse")], [], None]
    entities = [
        {"rcsb_entity_source_organism": s and [{"ncbi_scientific_name": n, "scientific_name": d} for n, d in s]}
        for s in sources
    ]
    assert facts_from_rcsb({"polymer_entities": entities}).organisms == ("Mus musculus", "Unknown phage")


@pytest.mark.parametrize(
    "entry, named",
    [
        ({"rcsb_entry_info": {"entity_count": "3"}}, "entity_count is '3', wanted an integer"),
        ({"rcsb_entry_info": {"entity_count": True}}, "entity_count is True, wanted an integer"),
        ({"rcsb_entry_info": {"molecular_weight": "heavy"}}, "molecular_weight"),
        ({"rcsb_entry_info": []}, r"rcsb_entry_info is \[\], wanted an object"),
        ({"rcsb_entry_info": {"resolution_combined": 2.0}}, "resolution_combined"),
        ({"struct": {"title": 7}}, "title is 7, wanted a text"),
        ({"exptl": {"method": "X"}}, "exptl"),
        ({"polymer_entities": ["A"]}, "polymer_entities"),
    ],
)
def test_an_answer_in_another_schema_is_refused_by_field(entry, named):
    with pytest.raises(AnnotationError, match=named):
        annotation_from_rcsb(entry)


# --- ids and clusters


@pytest.mark.parametrize(
    "text, wanted", [("1ABC", "1abc"), (" 4hhb\n", "4hhb"), ("PDB_00001ABC", "1abc"), ("pdb_10001abc", "pdb_10001abc")]
)
def test_an_id_has_one_spelling(text, wanted):
    assert entry_id(text) == wanted
    assert entry_id(wanted) == wanted


@given(st.text(max_size=14))
def test_no_id_leaves_the_folder_of_the_cache(text):
    try:
        assert re.fullmatch("[a-z0-9_]+", entry_id(text))
    except ValueError as error:
        assert "not the id of a PDB entry" in str(error)


def test_clusters_are_numbered_by_line_without_computed_models():
    lines = ["1ABC_1 AF_AFP68871F1_1 2XYZ_2\n", "MA_MABAKCEPC0534_1\n", "3def_1 PDB_00001ABC_2 PDB_10001ABC_1\n"]
    assert parse_clusters(lines) == {"1ABC_1": 0, "2XYZ_2": 0, "3DEF_1": 2, "1ABC_2": 2, "PDB_10001ABC_1": 2}


def test_an_entity_in_two_clusters_is_refused():
    with pytest.raises(ValueError, match="1ABC_1 is in the clusters of lines 1 and 3"):
        parse_clusters(["1ABC_1", "2XYZ_1", "1ABC_1"])


def test_the_query_is_in_rcsbs_schema_and_asks_for_all_that_is_read(tmp_path):
    """The server refuses unknown fields, and gives back only those asked for."""
    with RcsbServer() as server:
        server.entries["1hv4"] = ENTRY_1HV4
        client = Client(tmp_path, server.addresses, requests_per_second=1e4, timeout=10)
        assert client.fetch_annotations(["1HV4"])["1hv4"] == annotation_from_rcsb(ENTRY_1HV4)


# --- the mirror


def put(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_mirror_is_read_flat_or_in_two_letter_folders_and_names_what_is_broken(tmp_path):
    put(tmp_path / "1hv4.json", ENTRY_1HV4)
    put(tmp_path / "ab" / "1abc.json", make_entry("1abc"))
    put(tmp_path / "ab" / "2abc.json", make_entry("3xyz"))
    put(tmp_path / "ab" / "4abc.json", '{"rcsb_id": "4AB')
    put(tmp_path / "ab" / "5abc.json", {"title": "no id"})
    put(tmp_path / "ab" / "6abc.json", {"rcsb_id": "6ABC", "exptl": "X-ray"})
    put(tmp_path / "ab" / "7abc.json", "[" * 100_000)
    put(tmp_path / "notes.txt", "not read")
    broken = {}
    annotations = read_annotations(tmp_path, broken)
    assert set(annotations) == {"1hv4", "1abc"}
    assert annotations["1hv4"].facts == FACTS_1HV4
    reasons = {Path(path).name: reason for path, reason in broken.items()}
    assert set(reasons) == {"2abc.json", "4abc.json", "5abc.json", "6abc.json", "7abc.json"}
    assert "holds entry 3xyz" in reasons["2abc.json"] and "not JSON" in reasons["4abc.json"]
    assert "not JSON" in reasons["7abc.json"]
    assert "rcsb_id" in reasons["5abc.json"] and "exptl" in reasons["6abc.json"]


def test_broken_annotations_are_warned_about_where_nobody_counts_them(tmp_path):
    put(tmp_path / "1abc.json", "")
    with pytest.warns(UserWarning, match="1abc.json: not JSON"):
        assert read_annotations(tmp_path) == {}


def test_a_mirror_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(AnnotationError, match="nowhere: not a directory"):
        read_annotations(tmp_path / "nowhere")
