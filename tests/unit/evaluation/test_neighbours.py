"""The nearest training sequence, against the definition with Python's sets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.evaluation.neighbours import Neighbour, Neighbours

sequences = st.text("ACDEFG", min_size=1, max_size=30)


def words(sequence: str) -> set[str]:
    padded = sequence.ljust(3, "-")
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def jaccard(a: str, b: str) -> float:
    return len(words(a) & words(b)) / len(words(a) | words(b))


@given(st.lists(sequences, min_size=1, max_size=12), sequences)
def test_it_is_the_one_with_the_largest_share_of_words_in_common(training, query):
    found = Neighbours(training).nearest(query)
    similarities = [jaccard(one, query) for one in training]
    assert found.similarity == pytest.approx(max(similarities))
    assert found.index == (similarities.index(max(similarities)) if max(similarities) else -1)


def test_by_hand():
    """MKVLA has MKV KVL VLA, MKVLG has MKV KVL VLG: two of four."""
    found = Neighbours(["GGGGG", "MKVLA"]).nearest("MKVLG")
    assert (found.index, found.similarity) == (1, 0.5)


def test_letters_beyond_the_alphabet_are_unknown_and_case_does_not_matter():
    assert Neighbours(["AXA"]).nearest("a?a").similarity == 1
    assert Neighbours([]).nearest("ACD").index == -1


def test_unknown_sequences_are_not_alike():
    """Published embeddings come without sequences: all X."""
    assert Neighbours(["XXXXX"]).nearest("XXXX") == Neighbour(-1, None)
    assert Neighbours(["XXXXX", "AXXXX"]).nearest("AXXXX").index == 1
    assert Neighbours(["XXXXX"]).nearest("MKV") == Neighbour(-1, 0.0)
