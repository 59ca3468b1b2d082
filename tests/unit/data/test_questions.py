"""Questions and descriptions against proteins, facts and sentences written by hand, and the published set by itself."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.questions import PUBLISHED, closed_questions, describe, experimental_method, published_questions
from proteingpt.protein import Facts, Protein, Turn

PUBLISHED_SET = Path(__file__).parents[4] / "shared" / "data" / "proteinchat" / "qa.json"


def make_protein(length=5, num_unresolved=2, confidence=None):
    backbone = np.zeros((length, 3, 3), np.float32)
    backbone[:num_unresolved, 1] = np.nan
    return Protein("1abc", "A", "ACDEFGHIKLMNPQRSTVWY"[:length], backbone, confidence)


FULL_FACTS = Facts(
    title="Crystal structure of  a \n retinoic-acid-binding protein.",
    keywords=("VITAMIN A", "RETINOIC ACID", "Vitamin a"),
    classification="TRANSPORT  PROTEIN",
    methods=("X-RAY DIFFRACTION",),
    methodology="experimental",
    resolution=1.8,
    wavelength=0.971,
    organisms=("Homo sapiens", "Mus musculus"),
    year=1994,
    publication_year=1995,
    software=("XDS", "PHASER"),
    molecular_weight=52.1,
    num_models=1,
    num_assemblies=4,
    num_chains=2,
    num_entities=7,
    num_polymer_entities=3,
    num_nonpolymer_entities=1,
    num_branched_entities=0,
    num_solvent_entities=1,
    num_dna_entities=2,
    num_rna_entities=0,
    num_hybrid_entities=0,
    num_nucleic_acid_entities=2,
    num_heavy_atoms=3171,
    num_hydrogen_atoms=0,
    num_solvent_atoms=65,
    num_polymer_monomers=424,
    num_unmodeled_monomers=12,
    num_covalent_bonds=20,
    num_metal_bonds=3,
    num_cis_peptides=0,
    polymer_composition="protein/NA",
    polymer_type="Protein/NA",
    nucleic_acid_type="Other",
    nonpolymer_components=("ZN", "CA"),
)


def test_every_fact_is_asked_about_in_the_published_order_and_then_ours():
    assert [(turn.question, turn.answer) for turn in closed_questions(make_protein(), FULL_FACTS)] == [
        ("How many assemblies does this protein have?", "4"),
        ("How many entities does this protein have?", "7"),
        ("How many heavy atom coordinates records does this protein have?", "3171"),
        ("How many hydrogen atom coordinates records does this protein have?", "0"),
        ("How many model structures deposited for this protein?", "1"),
        ("How many polymer monomers does this protein have?", "424"),
        ("How many heavy solvent atom coordinates records does this protein have?", "65"),
        ("How many nucleic acid polymer entities (DNA or RNA) does this protein have?", "2"),
        ("What is the radiation wavelength in angstroms for this protein?", "0.971"),
        ("How many intermolecular covalent bonds does this protein have?", "20"),
        ("How many intermolecular metalic bonds does this protein have?", "3"),
        ("Does this protein contain non-polymer entities?", "YES"),
        ("Does this protein contain polymer entities?", "YES"),
        ("Does this protein contain DNA polymer entities?", "YES"),
        ("Does this protein contain RNA polymer entities?", "NO"),
        ("Does this protein contain solvent entities?", "YES"),
        ("Does this protein contain branched entities?", "NO"),
        ("Does this protein have unmodeled polymer monomers?", "YES"),
        ("Does this protein have hybrid nucleic acid polymer entities?", "NO"),
        ("Does this protein have cis-peptide linkages?", "NO"),
        ("What is the polymer entity composition for this protein?", "protein/NA"),
        ("What is the nucleic acid polymer entity type for this protein?", "Other"),
        ("What are the bound nonpolymer components for this protein", "CA, ZN"),
        ("What experimental method(s) were used to determine the structure of this protein?", "X-ray"),
        (
            "What is the molecular mass (KDa) of polymer and non-polymer entities (exclusive of solvent) "
            "for this protein?",
            "52.1",
        ),
        ("What is the polymer entity type for this protein?", "Protein/NA"),
        (
            "What are the software programs reported in connection with the production of this protein?",
            "PHASER, XDS",
        ),
        ("Is this protein determined by experimental or computational methods?", "experimental"),
        ("What are the terms characterizing the protein?", "TRANSPORT PROTEIN"),
        ("When is this protein first published?", "1995"),
        ("How many residues does this protein chain have?", "5"),
        ("How many residues of this protein chain are unresolved?", "2"),
        ("How many polymer chains does the structure of this protein have?", "2"),
        ("What is the resolution in angstroms for this protein?", "1.8"),
        ("What source organism(s) were reported for this protein?", "Homo sapiens, Mus musculus"),
        ("In which year was the structure of this protein deposited?", "1994"),
    ]


def test_without_facts_only_the_chain_is_asked_about():
    turns = closed_questions(make_protein(num_unresolved=0), Facts())
    assert [turn.answer for turn in turns] == ["5", "0"]


def test_what_is_known_to_be_empty_is_not_asked_about_either():
    nothing = Facts(keywords=(), methods=(), organisms=(), software=(), nonpolymer_components=())
    assert published_questions(nothing) == ()
    assert len(closed_questions(make_protein(), nothing)) == 2


@pytest.mark.parametrize("name", [field.name for field in fields(Facts)])
def test_an_unknown_fact_takes_away_its_own_questions_and_no_others(name):
    """Two facts stand in for another where that is unknown: chains for polymer entities, atoms of water for water."""
    without = published_questions(replace(FULL_FACTS, **{name: None}))
    assert set(without) <= set(published_questions(FULL_FACTS))
    unasked = {"title", "keywords", "resolution", "organisms", "year", "num_chains"}
    unasked |= {"num_polymer_entities", "num_solvent_entities"}
    assert len(without) == len(PUBLISHED) - (name not in unasked)


def test_chains_and_waters_answer_where_the_count_of_their_entities_is_unknown():
    answers = {turn.question: turn.answer for turn in published_questions(Facts(num_chains=2, num_solvent_atoms=0))}
    assert answers["Does this protein contain polymer entities?"] == "YES"
    assert answers["Does this protein contain solvent entities?"] == "NO"


@pytest.mark.parametrize(
    "resolution, answer", [(2.0, "2.0"), (1.098, "1.098"), (np.float32(1.8), "1.8"), (25.0, "25.0")]
)
def test_resolutions_are_decimal_numbers(resolution, answer):
    answers = {turn.question: turn.answer for turn in closed_questions(make_protein(), Facts(resolution=resolution))}
    assert answers["What is the resolution in angstroms for this protein?"] == answer


@pytest.mark.parametrize(
    "methods, answer",
    [
        (("X-RAY DIFFRACTION",), "X-ray"),
        (("X-ray diffraction",), "X-ray"),
        (("FIBER DIFFRACTION",), "X-ray"),
        (("SOLUTION NMR",), "NMR"),
        (("SOLUTION NMR", "SOLID-STATE NMR"), "Multiple methods"),
        (("ELECTRON MICROSCOPY",), "EM"),
        (("ELECTRON CRYSTALLOGRAPHY",), "EM"),
        (("NEUTRON DIFFRACTION",), "Neutron"),
        (("X-RAY DIFFRACTION", "NEUTRON DIFFRACTION"), "Multiple methods"),
        (("EPR",), "Other"),
        (("SOLUTION NMR", "THEORETICAL MODEL"), "NMR"),
        (("THEORETICAL MODEL",), None),
        ((), None),
        (None, None),
    ],
)
def test_methods_are_answered_in_the_words_of_rcsb(methods, answer):
    assert experimental_method(methods) == answer


# ------------------------------------------------------------------------------------------ the published set by itself


def published_set() -> dict[str, list[Turn]]:
    if not PUBLISHED_SET.is_file():
        pytest.skip(f"{PUBLISHED_SET} is absent")
    data = json.loads(PUBLISHED_SET.read_text())
    return {entry_id: [Turn(turn["Q"], str(turn["A"])) for turn in turns] for entry_id, turns in data.items()}


# The fact that each published question asks about, in the published order.
FACT_ASKED = (
    "num_assemblies num_entities num_heavy_atoms num_hydrogen_atoms num_models num_polymer_monomers num_solvent_atoms "
    "num_nucleic_acid_entities wavelength num_covalent_bonds num_metal_bonds num_nonpolymer_entities "
    "num_polymer_entities num_dna_entities num_rna_entities num_solvent_entities num_branched_entities "
    "num_unmodeled_monomers num_hybrid_entities num_cis_peptides polymer_composition nucleic_acid_type "
    "nonpolymer_components methods molecular_weight polymer_type software methodology classification publication_year"
).split()


def facts_of_answers(turns: list[Turn]) -> Facts:
    """The facts that the published answers give away: YES is at least one."""
    names = dict(zip((closed.question for closed in PUBLISHED), FACT_ASKED, strict=True))
    known = {}
    for turn in turns:
        name, answer = names[turn.question], turn.answer
        if answer in ("YES", "NO"):
            known[name] = int(answer == "YES")
        elif name.startswith("num_") or name == "publication_year":
            known[name] = int(answer)
        elif name in ("wavelength", "molecular_weight"):
            known[name] = float(answer)
        elif name in ("software", "nonpolymer_components"):
            known[name] = tuple(re.split(r", (?![^(]*\))", answer))  # `XENGEN (HOWARD, NIELSEN, XUONG)` is one program
        elif name == "methods":
            methods = {"X-ray": "X-RAY DIFFRACTION", "NMR": "SOLUTION NMR", "EM": "ELECTRON MICROSCOPY"}
            known[name] = (methods.get(answer, "NEUTRON DIFFRACTION"),)
        else:
            known[name] = answer
    return Facts(**known)


def test_every_published_turn_comes_back_to_the_letter_from_the_facts_it_states():
    """Wording, order, format of every answer, and that the 28 to 30 asked are those that have one: 508 proteins."""
    by_id = published_set()
    assert len(by_id) > 500
    for entry_id, turns in by_id.items():
        assert list(published_questions(facts_of_answers(turns))) == turns, entry_id


# --------------------------------------------------------------------------------------------------------- descriptions


def test_a_description_holds_what_the_file_says():
    assert describe(make_protein(), FULL_FACTS) == (
        'The title of this structure is "Crystal structure of a retinoic-acid-binding protein". '
        "The classification is TRANSPORT PROTEIN. "
        "The keywords are VITAMIN A and RETINOIC ACID. "
        "The structure was determined by X-ray diffraction at a resolution of 1.8 angstroms. "
        "The source organisms are Homo sapiens and Mus musculus. "
        "The protein chain has 5 residues, of which 2 are unresolved."
    )


def test_a_description_leaves_out_what_is_not_known():
    assert describe(make_protein(num_unresolved=0), Facts()) == "The protein chain has 5 residues."
    assert describe(make_protein(1, 1), Facts(keywords=("PEPTIDE",), methods=("SOLID-STATE NMR",))) == (
        "The keyword is PEPTIDE. The structure was determined by solid-state NMR. "
        "The protein chain has 1 residue, of which 1 is unresolved."
    )
    assert describe(make_protein(num_unresolved=0), Facts(methods=("THEORETICAL MODEL",))) == (
        "The structure was predicted by computation. The protein chain has 5 residues."
    )


TEXT = st.text(max_size=30)


@given(
    title=st.none() | TEXT,
    keywords=st.none() | st.lists(TEXT, max_size=3).map(tuple),
    classification=st.none() | TEXT,
    methods=st.none() | st.lists(st.sampled_from(["X-RAY DIFFRACTION", "EPR", "THEORETICAL MODEL"])).map(tuple),
    organisms=st.none() | st.lists(TEXT, max_size=3).map(tuple),
)
def test_a_description_is_one_tidy_paragraph_whatever_was_deposited(**known):
    text = describe(make_protein(), Facts(**known))
    assert text == " ".join(text.split())
    assert text.startswith(("The title", "The classification", "The keyword", "The structure", "The source", "The pro"))
    assert text.endswith(".") and text.count('"') in (0, 2)
