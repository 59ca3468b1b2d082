"""Tiny checkpoints in the published formats, and proteins with a chain-like backbone that is nowhere symmetric."""

import warnings

import numpy as np
import pytest
import torch

from proteingpt.demo.encoders import write_tiny_esm2, write_tiny_esm_if1
from proteingpt.encoders import fair_esm
from proteingpt.protein import Protein


@pytest.fixture(scope="session")
def esm2_file(tmp_path_factory):
    return write_tiny_esm2(tmp_path_factory.mktemp("esm2") / "tiny.pt")


@pytest.fixture(scope="session")
def esm_if1_file(tmp_path_factory):
    return write_tiny_esm_if1(tmp_path_factory.mktemp("esm_if1") / "tiny.pt")


@pytest.fixture(scope="session")
def make_protein():
    def make(length: int, seed: int = 0, missing=(), **fields) -> Protein:
        rng = np.random.default_rng((seed, length))
        step = rng.normal(size=(length, 3))
        alpha = np.cumsum(3.8 * step / np.linalg.norm(step, axis=1, keepdims=True), axis=0)
        offsets = rng.normal(size=(length, 3, 3))
        offsets *= 1.5 / np.linalg.norm(offsets, axis=2, keepdims=True)
        offsets[:, 1] = 0
        backbone = (alpha[:, None] + offsets).astype(np.float32)
        backbone[list(missing)] = np.nan
        sequence = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length))
        return Protein("test", "A", **{"sequence": sequence, "backbone": backbone, **fields})

    return make


@pytest.fixture(scope="session")
def load_with_fair_esm():
    """fair-esm's own loader, minus its `torch.load` (which newer torch refuses): (model in eval mode, alphabet)."""

    def load(path, name):
        fair_esm.inverse_folding()
        data = torch.load(path, weights_only=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Regression weights not found")
            model, alphabet = fair_esm.esm().pretrained.load_model_and_alphabet_core(name, data, None)
        return model.eval(), alphabet

    return load


@pytest.fixture
def edited(tmp_path):
    """Writes a changed copy of a checkpoint: `edited(path, change)`, where change(checkpoint) works in place."""

    def edit(path, change):
        checkpoint = torch.load(path, weights_only=False)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "edited.pt")
        return str(tmp_path / "edited.pt")

    return edit
