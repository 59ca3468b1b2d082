"""Crops: a window of the right length, sequence and coordinates alike, wherever it is drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.crop import crop, window_start
from proteingpt.protein import Protein

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def protein(length: int, confidence: bool = True) -> Protein:
    backbone = np.arange(length * 9, dtype=np.float32).reshape(length, 3, 3)
    sequence = "".join(LETTERS[n % 20] for n in range(length))
    return Protein("1abc", "A", sequence, backbone, np.linspace(0, 1, length, dtype=np.float32) if confidence else None)


draws = st.none() | st.tuples(st.integers(0, 2**32), st.integers(0, 50))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**64 - 1), draws)
def test_a_window_lies_within_the_protein_and_every_residue_keeps_its_letter_and_atoms(spare, length, sample_id, draw):
    whole = protein(length + spare)
    start = window_start(len(whole), length, sample_id, draw)
    cut = crop(whole, start, length)
    assert 0 <= start <= spare and len(cut) == length
    for row in range(length):
        assert cut.sequence[row] == whole.sequence[start + row]
        assert np.array_equal(cut.backbone[row], whole.backbone[start + row])
        assert cut.confidence[row] == whole.confidence[start + row]


def test_the_middle_where_nothing_is_drawn():
    assert [window_start(10, length, 7, None) for length in (10, 9, 8, 1)] == [0, 0, 1, 4]


def test_the_window_is_drawn_anew_in_each_epoch_and_evenly():
    """Chi-squared over 1,000 epochs for 5 places: 4 degrees of freedom, 18.5 is the 0.1 % point. The seed is fixed."""
    starts = [window_start(104, 100, 99, (42, epoch)) for epoch in range(1000)]
    counts = np.bincount(starts, minlength=5)
    assert len(counts) == 5 and ((counts - 200) ** 2 / 200).sum() < 18.5
    assert starts == [window_start(104, 100, 99, (42, epoch)) for epoch in range(1000)]
    assert starts != [window_start(104, 100, 98, (42, epoch)) for epoch in range(1000)]


@pytest.mark.parametrize("confidence", [True, False])
def test_two_windows_of_a_protein_have_two_keys(confidence):
    """Encoders remember rows by key."""
    whole = protein(12, confidence)
    one, other = crop(whole, 0, 5), crop(whole, 7, 5)
    assert one.key == "1abc[0:5]_A" and len({one.key, other.key, whole.key}) == 3
    assert (one.confidence is None) == (not confidence)
