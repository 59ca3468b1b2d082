"""The bytes of one protein's rows, against the safetensors library."""

import dataclasses

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.encoders.rows_file import DTYPES, decode_rows, encode_rows, inputs_sha256, num_bytes

INPUTS = "0123456789abcdef" * 4


@given(
    length=st.integers(1, 120),
    widths=st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any),
    dtype=st.sampled_from(sorted(DTYPES)),
    key=st.text("abcXYZ019_-", min_size=1, max_size=85),
)
def test_the_size_is_known_beforehand_and_safetensors_reads_the_very_numbers(length, widths, dtype, key):
    rows = [torch.randn(length + 2 if width else 0, width).to(getattr(torch, dtype)) for width in widths]
    data = encode_rows(key, INPUTS, *rows, dtype)
    assert len(data) == num_bytes(key, length, dict(zip(("structure", "sequence"), widths)), dtype)
    wanted = {part: value for part, value in zip(("structure", "sequence"), rows) if value.shape[1]}
    metadata, ours = decode_rows(bytearray(data))
    assert metadata == {"key": key, "inputs": INPUTS}
    for found in (safetensors.torch.load(data), ours):
        assert found.keys() == wanted.keys()
        assert all(
            found[part].dtype == wanted[part].dtype and torch.equal(found[part], wanted[part]) for part in wanted
        )


@given(cut=st.integers(0, 400), junk=st.binary(max_size=64))
def test_other_bytes_are_a_value_error(cut, junk):
    whole = encode_rows("1abc_A", INPUTS, torch.ones(5, 4), torch.ones(5, 8), "float32")
    for data in (whole[: min(cut, len(whole) - 1)], junk):
        with pytest.raises(ValueError):
            decode_rows(bytearray(data))


def test_the_inputs_are_all_that_an_encoder_reads(make_protein):
    protein = make_protein(6)
    moved = protein.backbone.copy()
    moved[3, 1, 0] += 0.001
    others = [
        dataclasses.replace(protein, sequence="W" + protein.sequence[1:] if protein.sequence[0] != "W" else "A" * 6),
        dataclasses.replace(protein, backbone=moved),
        dataclasses.replace(protein, confidence=protein.backbone[:, 0, 0] * 0 + 1),
    ]
    assert len({inputs_sha256(p) for p in (protein, *others)}) == 4
    assert inputs_sha256(dataclasses.replace(protein, id="other", chain="B")) == inputs_sha256(protein)
