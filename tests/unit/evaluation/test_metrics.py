"""Normalisation and exact match, against pairs written by hand; class scores against scikit-learn's."""

import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.evaluation.metrics import (
    accuracy,
    balanced_accuracy,
    exact_match,
    matthews_correlation,
    normalise,
    parse_number,
    within_tolerance,
)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("  YES ", "yes"),
        ("Yes.", "yes"),
        ('"X-ray".', "x-ray"),
        ("\u201chelix\u201d", "helix"),
        ("\u00abcoil.\u00bb", "coil"),
        ("alpha \n\t helix", "alpha helix"),
        ("1.50", "1.5"),
        ("2.0", "2"),
        ("100", "100"),
        ("0.10 to 10.00 angstrom", "0.1 to 10 angstrom"),
        ("-1.50", "-1.5"),
        ("about 1.50. No more", "about 1.5. no more"),
        ("1.5418", "1.5418"),
        ("1.2.10", "1.2.10"),
        ("3.5.1.30", "3.5.1.30"),
        ("v1.0", "v1.0"),
        ("1.50\u00c5", "1.50\u00e5"),
        ("\uff11.\uff15\uff10", "1.5"),
        ("\ufb01bre", "fibre"),
        ("Stra\u00dfe", "strasse"),
        ("e\u0301", "\u00e9"),
        ("E. coli", "e. coli"),
        ("3'-phosphate", "3'-phosphate"),
        ("ends in a prime'", "ends in a prime"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_normal_forms_written_by_hand(text, wanted):
    assert normalise(text) == wanted


@pytest.mark.parametrize(
    "prediction, answer",
    [("YES", "yes"), ("Homomeric protein.", "homomeric protein"), ("1.50", "1.5"), ("2", "2.00"), (" 'EM' ", "EM")],
)
def test_spelling_is_forgiven(prediction, answer):
    assert exact_match(prediction, answer)


@pytest.mark.parametrize(
    "prediction, answer",
    [
        ("X-ray diffraction", "X-ray"),
        ("yes no", "yes"),
        ("1.05", "1.5"),
        ("10", "1"),
        ("10", "100"),
        ("-1.5", "1.5"),
        ("", "yes"),
        ("helix and strand", "strand and helix"),
    ],
)
def test_content_is_not_forgiven(prediction, answer):
    assert not exact_match(prediction, answer)


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet="aZ \u00df\u0130\u03b1\u0345\u01c5\ufb03\u2126 .\"'0123456789-"))
def test_normalising_twice_changes_nothing_where_rules_meet(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text())
def test_case_outer_space_and_quotes_never_matter(text):
    assert exact_match(f' "{text}".\n', text)


@given(st.decimals(min_value=0, max_value=10**6, places=3), st.integers(min_value=0, max_value=3))
def test_trailing_zeros_never_matter(number, num_zeros):
    assert exact_match(f"{number:.3f}" + "0" * num_zeros, f"{number:.3f}")


@given(st.decimals(min_value=0, max_value=999, places=3), st.decimals(min_value=0, max_value=999, places=3))
def test_numbers_match_exactly_when_they_are_equal(a, b):
    assert exact_match(f"{a:.3f}", f"{b:.3f}") == (a == b)


def test_accuracy_counted_by_hand():
    predictions = ["Yes", "no", "2.0", "helix.", "coil"]
    assert accuracy(predictions, ["yes", "yes", "2", "helix", "strand"]) == 3 / 5


def test_accuracy_refuses_lists_of_unlike_length():
    with pytest.raises(ValueError, match="2 predictions for 1 answers"):
        accuracy(["yes", "no"], ["yes"])


def test_accuracy_refuses_an_empty_list():
    with pytest.raises(ValueError, match="no answers to score"):
        accuracy([], [])


# ------------------------------------------------------------------------------------------------ numbers and classes


@pytest.mark.parametrize(
    "text, number",
    [
        ("4", 4), (" 4. ", 4), ("0.9795", 0.9795), ("1,204", 1204), ("-3.50", -3.5), ("1e-3", 0.001), (".5", 0.5),
        ("+2", 2),
        ("2 A", None), ("", None), ("N/A", None), ("1,20", None), ("1.2.3", None), ("about 4", None), ("e5", None),
        ("1e999", None), ("inf", None), ("nan", None), ("-", None),
    ],
)  # fmt: skip
def test_a_number_is_the_whole_text_or_none(text, number):
    assert parse_number(text) == number


def test_a_tolerance_is_a_share_of_the_true_answer():
    """By hand: 5 % of 200 is 10."""
    assert [within_tolerance(text, 200.0, 0.05) for text in ("200", "190", "210.0", "189", "211", "N/A")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert within_tolerance("0", 0.0, 0.05) and not within_tolerance("0.01", 0.0, 0.05)


labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40)


@given(labels)
def test_class_scores_are_those_of_scikit_learn(pairs):
    """Class 4 is never an answer: what is said beyond the known answers."""
    true, said = map(list, zip(*pairs))
    confusion = np.zeros((5, 5))
    np.add.at(confusion, (true, said), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn names predictions that are never true
        assert balanced_accuracy(confusion) == pytest.approx(sklearn.metrics.balanced_accuracy_score(true, said))
        wanted = sklearn.metrics.matthews_corrcoef(true, said)
    assert matthews_correlation(confusion) == pytest.approx(wanted, abs=1e-9)
    both = matthews_correlation(np.stack([confusion, confusion]))  # many at once, as the bootstrap asks
    assert both == pytest.approx([wanted, wanted], abs=1e-9)


def test_class_scores_by_hand():
    """4 yes, of which 3 are said to be; 2 no, of which 1 is: recalls 3/4 and 1/2."""
    confusion = np.array([[3.0, 1.0], [1.0, 1.0]])
    assert balanced_accuracy(confusion) == pytest.approx(5 / 8)
    assert matthews_correlation(confusion) == pytest.approx((3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2))
    assert matthews_correlation(np.array([[4.0, 0.0], [2.0, 0.0]])) == 0
