"""The check of encoder weights passes what is right and names what is not."""

import math

import pytest
import torch

from proteingpt.encoders.check import check_encoders, observed_part, probes, relative_error


def failed(**options) -> list[tuple[str, str]]:
    options = {"esm2": None, "esm_if1": None, **options}
    return [(result.encoder, result.check) for result in check_encoders(**options) if not result.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_good_weights_pass_in_any_precision(esm2_file, esm_if1_file, dtype):
    assert failed(esm2=str(esm2_file), esm_if1=str(esm_if1_file), dtype=dtype) == []


def test_weights_that_are_not_whole_fail_alone(edited, esm2_file, esm_if1_file):
    path = edited(esm2_file, lambda c: c["model"].pop("encoder.sentence_encoder.layers.1.fc1.bias"))
    assert failed(esm2=path, esm_if1=str(esm_if1_file)) == [("ESM-2", "names and shapes")]
    assert failed(esm2="nowhere/esm2.pt") == [("ESM-2", "names and shapes")]


def test_frequencies_that_differ_between_layers_are_named(edited, esm2_file):
    def change(checkpoint):
        checkpoint["model"]["encoder.sentence_encoder.layers.1.self_attn.rot_emb.inv_freq"] *= 0.5

    results = list(check_encoders(esm2=edited(esm2_file, change), esm_if1=None))
    assert [(r.check, r.detail) for r in results if not r.passed] == [
        ("rotary frequencies", "layers [1] differ from layer 0")
    ]


def test_rows_that_overflow_are_named(edited, esm_if1_file):
    def change(checkpoint):
        checkpoint["model"]["encoder.layers.0.fc1.bias"][:] = 1e5

    path = edited(esm_if1_file, change)
    assert ("ESM-IF1", "finite rows") in failed(esm_if1=path, dtype=torch.float16)
    assert ("ESM-IF1", "finite rows") not in failed(esm_if1=path, dtype=torch.float32)


def test_rows_unlike_fair_esms_fail(esm2_file, monkeypatch):
    """An error of two per cent in the scale of the embedding, as a forgotten 0.88 would be one of twelve."""
    monkeypatch.setattr("proteingpt.encoders.esm2_packed.TOKEN_DROPOUT_SCALE", 0.9)
    assert failed(esm2=str(esm2_file)) == [("ESM-2", "equal to fair-esm")]


def test_half_a_golden_value_or_nothing_to_check_is_refused(esm2_file, tmp_path):
    with pytest.raises(ValueError, match="nothing to check: give --esm2, --esm-if or both"):
        failed()
    for options in ({"structure": tmp_path}, {"embedding": tmp_path}, {"structure": tmp_path, "embedding": tmp_path}):
        with pytest.raises(ValueError, match="--structure and --embedding together, with --esm-if"):
            failed(esm2=str(esm2_file), **options)


def test_a_device_that_is_not_there_is_refused(esm2_file):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=f"the device {device} cannot be used here: "):
            failed(esm2=str(esm2_file), device=device)


def test_an_error_that_is_no_number_is_no_agreement():
    rows = torch.ones(3, 2)
    assert relative_error(rows, rows) == 0
    assert relative_error(rows * 1.5, rows) == pytest.approx(0.5)
    assert relative_error(rows * torch.nan, rows) == math.inf


def test_the_observed_part_by_hand(make_protein):
    protein = make_protein(5, missing=[1, 4], sequence="MKVLA")
    observed = observed_part(protein)
    assert observed.sequence == "MVL" and (observed.backbone == protein.backbone[[0, 2, 3]]).all()


def test_probes_have_what_goes_wrong():
    assert {len(p) for p in probes()} >= {1} and any(not p.resolved.all() for p in probes())
    assert any("J" in p.sequence for p in probes()) and any(p.confidence is not None for p in probes())
