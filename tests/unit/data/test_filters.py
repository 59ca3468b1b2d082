"""Each filter by hand-made proteins, and the funnel against a hand count."""

import numpy as np
import pytest

from proteingpt.data.filters import STEP_OF, Filters, asked_steps, count_funnel, refuse_chain, wanted_chains
from proteingpt.protein import Facts, Protein


def protein(sequence="ACDEF", resolved=True, id="1abc", confidence=None) -> Protein:
    backbone = np.full((len(sequence), 3, 3), 1.0 if resolved else np.nan, np.float32)
    return Protein(id, "A", sequence, backbone, confidence)


XRAY = Facts(methods=("X-RAY DIFFRACTION",), resolution=2.1)
NMR = Facts(methods=("SOLUTION NMR",))
EM = Facts(methods=("ELECTRON MICROSCOPY",), resolution=3.5)


@pytest.mark.parametrize(
    "chain, facts, filters, reason",
    [
        (protein(), XRAY, Filters(), None),
        (protein("XXX"), XRAY, Filters(), "no standard residue"),
        (protein(resolved=False), XRAY, Filters(), "no backbone"),
        (protein("ACX"), XRAY, Filters(), None),
        (protein("ACX"), XRAY, Filters(standard_letters_only=True), "non-coding letters"),
        (protein("ACU"), XRAY, Filters(standard_letters_only=True), "non-coding letters"),
        (protein("ACDEFGHIKLMNPQRSTVWY"), XRAY, Filters(standard_letters_only=True), None),
        (protein(), XRAY, Filters(methods=("x-ray",)), None),
        (protein(), NMR, Filters(methods=("X-RAY DIFFRACTION", "em")), "other method"),
        (protein(), EM, Filters(methods=("X-RAY DIFFRACTION", "em")), None),
        (protein(), Facts(), Filters(methods=("nmr",)), "other method"),
        (protein(confidence=np.ones(5, np.float32)), Facts(), Filters(methods=("predicted",)), None),
        (protein(), Facts(methodology="computational"), Filters(methods=("predicted",)), None),
        (protein(), XRAY, Filters(max_resolution=2.1), None),
        (protein(), XRAY, Filters(max_resolution=2.0), "poor resolution"),
        (protein(), NMR, Filters(max_resolution=2.0), "no resolution"),
        (protein(), XRAY, Filters(min_residues=6), "too short"),
        (protein(), XRAY, Filters(max_residues=4), "too long"),
        (protein(), XRAY, Filters(min_residues=5, max_residues=5), None),
        (protein(id="1.abc"), XRAY, Filters(), "bad key"),
    ],
)
def test_a_chain_falls_at_the_first_step_it_fails(chain, facts, filters, reason):
    refusal = refuse_chain(chain, facts, filters)
    assert refusal is None if reason is None else refusal[0] == reason and refusal[1]
    assert reason is None or reason in STEP_OF


def test_the_detail_counts_the_letters():
    refusal = refuse_chain(protein("ACXXU"), XRAY, Filters(standard_letters_only=True))
    assert refusal == ("non-coding letters", "3 of 5 letters are U, X")


def test_the_papers_filters_come_in_its_order():
    """204,826 entries; with abstract and chain A; without non-coding letters."""
    steps = asked_steps(Filters(require_abstract=True, standard_letters_only=True))
    names = ["has an abstract", "has the wanted chain", "no non-coding letters"]
    assert [name for name in steps if name in names] == names


def test_the_funnel_against_a_hand_count():
    """Ten entries: two without an abstract, one cut, one of whose two chains one is missing and one has an X, three
    that are too short."""
    dropped = [["no abstract"]] * 2 + [["unreadable"]] + [["no such protein chain", "non-coding letters"]]
    dropped += [["too short"]] * 3
    funnel = count_funnel(10, dropped, asked_steps(Filters(min_residues=9)))
    assert funnel == [
        ("entries", 10),
        ("has an abstract", 8),
        ("is readable", 7),
        ("has the wanted chain", 7),
        ("has a backbone", 7),
        ("no non-coding letters", 6),
        ("wanted length", 3),
    ]


def test_wanted_chains():
    assert wanted_chains("all", ("A", "B")) == ["A", "B"] and wanted_chains("first", ("B", "A")) == ["B"]
    assert wanted_chains("C", ("A",)) == ["C"] and wanted_chains("label:X", ("A",)) == ["label:X"]
