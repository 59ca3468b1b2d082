"""Questions and descriptions against proteins and sentences written by hand, and against the published wordings."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.questions import closed_questions, describe, experimental_method, methodology
from proteingpt.protein import Facts, Protein, Turn

PUBLISHED = Path(__file__).parents[4] / "shared" / "data" / "proteinchat" / "qa.json"


def make_protein(length=5, num_unresolved=2, confidence=None):
    backbone = np.zeros((length, 3, 3), np.float32)
    backbone[:num_unresolved, 1] = np.nan
    return Protein("1abc", "A", "ACDEFGHIKLMNPQRSTVWY"[:length], backbone, confidence)


FULL_FACTS = Facts(
    title="Crystal structure of  a \n retinoic-acid-binding protein.",
    keywords=("TRANSPORT", "VITAMIN A", "RETINOIC ACID"),
    methods=("X-RAY DIFFRACTION",),
    resolution=1.8,
    organisms=("Homo sapiens", "Mus musculus"),
    year=1994,
    num_models=1,
    num_chains=2,
    num_polymer_entities=1,
)


def test_every_fact_is_asked_about_in_a_fixed_order():
    assert closed_questions(make_protein(), FULL_FACTS) == (
        Turn("How many residues does this protein chain have?", "5"),
        Turn("How many residues of this protein chain are unresolved?", "2"),
        Turn("How many polymer chains does the structure of this protein have?", "2"),
        Turn("How many polymer entities does this protein have?", "1"),
        Turn("How many model structures deposited for this protein?", "1"),
        Turn("What experimental method(s) were used to determine the structure of this protein?", "X-ray"),
        Turn("Is this protein determined by experimental or computational methods?", "experimental"),
        Turn("What is the resolution in angstroms for this protein?", "1.8"),
        Turn("What source organism(s) were reported for this protein?", "Homo sapiens, Mus musculus"),
        Turn("In which year was the structure of this protein deposited?", "1994"),
    )


def test_without_facts_only_the_chain_is_asked_about():
    turns = closed_questions(make_protein(num_unresolved=0), Facts())
    assert [turn.answer for turn in turns] == ["5", "0"]


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
        (("SOLUTION NMR",), "NMR"),
        (("SOLUTION NMR", "SOLID-STATE NMR"), "NMR"),
        (("ELECTRON MICROSCOPY",), "EM"),
        (("ELECTRON CRYSTALLOGRAPHY",), "EM"),
        (("NEUTRON DIFFRACTION",), "Neutron"),
        (("X-RAY DIFFRACTION", "NEUTRON DIFFRACTION"), "Multiple methods"),
        (("FIBER DIFFRACTION",), "Other"),
        (("SOLUTION NMR", "THEORETICAL MODEL"), "NMR"),
        (("THEORETICAL MODEL",), None),
        ((), None),
    ],
)
def test_methods_are_answered_by_family(methods, answer):
    assert experimental_method(methods) == answer


def test_a_predicted_model_is_computational():
    predicted = make_protein(confidence=np.ones(5, np.float32))
    assert methodology(predicted, ()) == "computational"
    assert methodology(make_protein(), ("THEORETICAL MODEL",)) == "computational"
    assert methodology(make_protein(), ("X-RAY DIFFRACTION",)) == "experimental"
    assert methodology(make_protein(), ()) is None


def test_published_wordings_and_answers_are_the_published_ones():
    """The three questions taken over from the published data stand there letter for letter, and so do our answers."""
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is absent")
    published: dict[str, set[str]] = {}
    for turns in json.loads(PUBLISHED.read_text()).values():
        for turn in turns:
            published.setdefault(turn["Q"], set()).add(str(turn["A"]))
    ours = {turn.question: turn.answer for turn in closed_questions(make_protein(), FULL_FACTS)}
    shared = published.keys() & ours.keys()
    assert shared == {
        "How many model structures deposited for this protein?",
        "What experimental method(s) were used to determine the structure of this protein?",
        "Is this protein determined by experimental or computational methods?",
    }
    assert all(ours[question] in published[question] for question in shared)


def test_a_description_holds_what_the_file_says():
    assert describe(make_protein(), FULL_FACTS) == (
        'The title of this structure is "Crystal structure of a retinoic-acid-binding protein". '
        "The keywords are TRANSPORT, VITAMIN A and RETINOIC ACID. "
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
    keywords=st.lists(TEXT, max_size=3).map(tuple),
    methods=st.lists(st.sampled_from(["X-RAY DIFFRACTION", "EPR", "THEORETICAL MODEL"]), max_size=2).map(tuple),
    organisms=st.lists(TEXT, max_size=3).map(tuple),
)
def test_a_description_is_one_tidy_paragraph_whatever_was_deposited(title, keywords, methods, organisms):
    text = describe(make_protein(), Facts(title, keywords, methods, None, organisms))
    assert text == " ".join(text.split())
    assert text.startswith(("The title", "The keyword", "The structure", "The source", "The protein"))
    assert text.endswith(".") and text.count('"') in (0, 2)
