"""What a stranger sends: read as from the disk, or refused in words, within bounds, by a process that leaves
nothing."""

import gzip
import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.data.structure import StructureError, read_entry
from proteingpt.inference import subject
from proteingpt.inference.upload import Limits, describe, read_upload, unpack

LIMITS = Limits()


@pytest.fixture(scope="module")
def example(demo_assets) -> bytes:
    return (demo_assets / "example.pdb").read_bytes()


@pytest.mark.parametrize("packed", [False, True])
def test_an_upload_is_the_protein_that_the_file_is(demo_assets, example, packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the process that reads
    found = read_upload(gzip.compress(example) if packed else example, "mine.pdb", None, LIMITS)
    whole = read_entry(demo_assets / "example.pdb").protein("A")
    protein = subject.from_json(found["protein"], 1000)
    assert (protein.sequence, protein.chain, found["chains"]) == (whole.sequence, "A", ["A"])
    np.testing.assert_array_equal(protein.backbone, whole.backbone)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data, says",
    [(b"\n", "the file is empty"), (b"\x89PNG\r\n\0\0", "binary content"), (b"<html></html>", "neither mmCIF"),
     (b"\x1f\x8bjunk", "damaged or truncated gzip"), (b"data_x\nloop_\n_atom_site.id\n1", "atom_site"),
     (b">a\nMK\n>b\nMV\n", "several FASTA records")],
)  # fmt: skip
def test_what_is_no_structure_is_refused_by_its_name(data, says):
    with pytest.raises(StructureError, match=f"^mine.pdb: .*{says}"):
        describe(data, "mine.pdb", None, LIMITS)


def test_the_words_of_the_process_are_the_reader_s_own(example):
    with pytest.raises(StructureError, match="^mine.pdb: no polymer chain 'Q'; the polypeptide chains are: A$"):
        read_upload(example, "mine.pdb", "Q", LIMITS)


def test_a_fasta_file_is_its_sequence():
    found = describe(b">sp|P1 mine\nMKTA\nYIAK\n", "mine.fasta", None, LIMITS)
    protein = subject.from_json(found["protein"], 1000)
    assert (protein.id, protein.sequence, found["pdb"]) == ("sp|P1", "MKTAYIAK", None)
    assert not protein.resolved.any()


def test_a_gzip_bomb_ends_at_the_bound():
    """A thousandth of what it unpacks to; refused by the block that is too many, which is all that was made of it."""
    bomb = gzip.compress(bytes(64 << 20), 9)
    assert len(bomb) < 100_000
    with pytest.raises(StructureError, match="more than 1 MB unpacked"):
        unpack(bomb, "bomb.gz", 1 << 20)


@given(st.binary(max_size=5000), st.integers(0, 6000))
def test_gzip_is_unpacked_as_gzip_does_it(data, bound):
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as file:
        file.write(data)
    if len(data) > bound:
        with pytest.raises(StructureError):
            unpack(packed.getvalue(), "x", bound)
    else:
        assert unpack(packed.getvalue(), "x", bound) == data


@settings(max_examples=50)
@given(st.data())
def test_a_damaged_upload_is_read_or_refused_but_raises_nothing_else(example, data):
    broken = bytearray(example)
    for _ in range(data.draw(st.integers(1, 5))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        describe(bytes(broken[: data.draw(st.integers(0, len(broken)))]), "mine.pdb", None, LIMITS)
    except subject.USER_ERRORS as error:
        assert "mine.pdb" in str(error) or "residues" in str(error)


def test_time_memory_and_length_are_bounded(example):
    with pytest.raises(StructureError, match="took more than 0.01 seconds"):
        read_upload(example, "mine.pdb", None, replace(LIMITS, seconds=0.01))
    with pytest.raises(StructureError, match="mine.pdb: .*(memory|MemoryError)"):
        read_upload(example + b"\n" * (100 << 20), "mine.pdb", None, replace(LIMITS, memory_bytes=300 << 20))
    with pytest.raises(subject.SubjectError, match="more than the 10 allowed"):
        describe(example, "mine.pdb", None, replace(LIMITS, residues=10))
