"""What is asked about, and what of it is missing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structure_files import everything, mmcif, numbered, residue

from proteingpt.data.structure import StructureError
from proteingpt.inference import subject
from proteingpt.inference.subject import SubjectError
from proteingpt.protein import Protein

sequences = st.text(subject.LETTERS, min_size=1, max_size=200)


@st.composite
def proteins(draw):
    letters = draw(sequences)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    backbone = rng.normal(0, 50, (len(letters), 3, 3)).astype(np.float32)
    backbone[rng.random(len(letters)) < draw(st.sampled_from([0, 0.3, 1]))] = np.nan
    confidence = rng.random(len(letters)).astype(np.float32) if draw(st.booleans()) else None
    return Protein("some", "A", letters, backbone, confidence)


@given(sequences, st.integers(1, 80), st.booleans(), st.booleans())
def test_a_fasta_record_is_its_letters_however_it_is_wrapped(letters, width, lower, titled):
    lines = [letters[i : i + width] for i in range(0, len(letters), width)]
    text = "\r\n".join([">sp|P1 a protein"] * titled + lines) + "*\n"
    assert subject.parse_sequence(text.lower() if lower else text) == (
        "sp|p1" if lower and titled else "sp|P1" * titled,
        letters,
    )


@pytest.mark.parametrize(
    "text, says",
    [("", "no sequence"), (">name\n", "no sequence"), ("MK1V", "'1' at position 3"), ("MK-V", "'-' at position 3"),
     (">a\nMK\n>b\nMV", "several FASTA records"), ("<b>", "'<' at position 1")],
)  # fmt: skip
def test_what_is_no_sequence_is_refused_with_the_place(text, says):
    with pytest.raises(SubjectError, match=says):
        subject.parse_sequence(text)


def test_chain_a_is_taken_or_the_first_where_there_is_none(tmp_path):
    (tmp_path / "both.cif").write_text(everything()[0])
    only_b = residue("GLY", 1, chain="B", label="B") + residue("ALA", 2, chain="B", label="B")
    (tmp_path / "b.cif").write_text(mmcif(only_b, {"1": numbered("GLY", "ALA")}))
    assert subject.read_structure(tmp_path / "both.cif")[1].chain == "A"
    assert subject.read_structure(tmp_path / "both.cif", "B")[1].sequence == "GA"
    assert subject.read_structure(tmp_path / "b.cif")[1].chain == "B"
    with pytest.raises(StructureError, match="b.cif.*'A'.*chains are: B"):
        subject.read_structure(tmp_path / "b.cif", "A")


def test_what_is_missing_is_counted(tmp_path):
    (tmp_path / "x.cif").write_text(everything()[0])
    protein = subject.read_structure(tmp_path / "x.cif")[1]  # five residues, the fourth not resolved
    assert subject.missing(protein) == ["1 of 5 residues have no coordinates."]
    assert subject.missing(protein, reads_structure=False) == []
    unknown = subject.with_sequence(protein, "MXXAA")
    assert subject.missing(unknown)[1] == "2 of 5 residues have no known letter (X)."
    (alone,) = subject.missing(subject.protein_of_sequence("MKV"))
    assert "No structure" in alone and "sequence-only" in alone
    (alone,) = subject.missing(subject.with_sequence(protein, "XXXXX"))[1:]
    assert "No sequence" in alone and "structure-only" in alone


def test_a_model_that_would_get_nothing_says_so():
    with pytest.raises(SubjectError, match="reads the structure, and there is none here: give a structure file"):
        subject.missing(subject.protein_of_sequence("MKV"), reads_sequence=False)
    with pytest.raises(SubjectError, match="reads the structure and the sequence"):
        subject.missing(subject.protein_of_sequence("XXX"))


CHAIN = Protein("9xyz", "A", "MKTXAYIAKQ", np.zeros((10, 3, 3), np.float32))
CHAIN.backbone[8:] = np.nan  # K and Q at the end are not resolved


@pytest.mark.parametrize(
    "letters, says",
    [
        ("MYPG", "has 4 residues, and chain A of 9xyz has 10: give the sequence of that chain as it was deposited"),
        ("GGGMKTWAYIAKQGG", "the chain's are its residues 4 to 13: give those alone"),
        ("MKTXAYIA", "it lacks those 2 that have no coordinates"),
        ("AYIAKQ", "it is residues 5 to 10 of the chain: give the whole of it"),
    ],
)
def test_a_sequence_of_another_length_is_refused_with_what_to_do(letters, says):
    with pytest.raises(SubjectError, match=says):
        subject.with_sequence(CHAIN, letters)


def test_a_sequence_needs_a_structure_to_go_with():
    with pytest.raises(SubjectError, match="mine has no structure that a sequence could go with"):
        subject.with_sequence(subject.protein_of_sequence(">mine\nMKV"), "MKV")


@pytest.mark.parametrize(
    "letters, notes",
    [
        ("MKTXAYIAKQ", []),
        ("MKTWAYIAKQ", []),  # a letter that the file does not know is no disagreement
        ("MRTWAYIAKQ", ["1 of 10 residues given differs from the file's (K2R): the model gets those given."]),
        ("AAAAAAAAAA", ["7 of 10 residues given differ from the file's (M1A, K2A, T3A, Y6A, I7A, ...): the model gets "
                        "those given."]),
    ],
)  # fmt: skip
def test_where_a_sequence_differs_from_the_files_is_said(letters, notes):
    given = subject.with_sequence(CHAIN, letters)
    assert given.sequence == letters and subject.differences(CHAIN, given) == notes
    np.testing.assert_array_equal(given.backbone, CHAIN.backbone)


@given(proteins())
def test_a_protein_comes_back_from_json_as_it_was(protein):
    back = subject.from_json(subject.to_json(protein), max_residues=200)
    assert (back.id, back.chain, back.sequence) == (protein.id, protein.chain, protein.sequence)
    np.testing.assert_array_equal(back.backbone, protein.backbone)
    if protein.confidence is None:
        assert back.confidence is None
    else:
        np.testing.assert_array_equal(back.confidence, protein.confidence)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
names = st.sampled_from(["id", "chain", "sequence", "backbone", "confidence"])


@given(proteins(), names, json_values)
def test_whatever_a_browser_sends_is_a_protein_or_refused(protein, name, value):
    values = {**subject.to_json(protein), name: value}
    try:
        found = subject.from_json(values, max_residues=200)
    except SubjectError:
        return
    assert len(found) <= 200 and not np.isinf(found.backbone).any()


@pytest.mark.parametrize(
    "name, value",
    [("backbone", np.full((3, 3, 3), np.inf)), ("backbone", np.full((3, 3, 3), 1e7)), ("backbone", np.zeros((2, 3, 3))),
     ("confidence", np.array([0, 1, 1.5])), ("confidence", np.array([0, 1, np.nan])), ("sequence", "mkv"),
     ("sequence", "MK V")],
)  # fmt: skip
def test_numbers_and_letters_beyond_reason_are_refused(name, value):
    if not isinstance(value, str):
        value = subject.base64.b64encode(value.astype("<f4").tobytes()).decode()
    with pytest.raises(SubjectError, match="not a protein"):
        subject.from_json({**subject.to_json(subject.protein_of_sequence("MKV")), name: value}, max_residues=200)


def test_more_residues_than_allowed_are_refused():
    with pytest.raises(SubjectError, match="201 residues are more than the 200"):
        subject.from_json(subject.to_json(subject.protein_of_sequence("A" * 201)), max_residues=200)
