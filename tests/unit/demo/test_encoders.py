"""The tiny checkpoints are in the published formats, reproducible, and their rows can be learned from."""

import hashlib
import math
import warnings

import numpy as np
import pytest
import torch

from proteingpt.demo.encoders import write_tiny_esm2, write_tiny_esm_if1
from proteingpt.encoders import fair_esm, load_esm2, load_esm_if1
from proteingpt.protein import Protein

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.mark.parametrize(
    "write, name", [(write_tiny_esm2, "esm2_tiny"), (write_tiny_esm_if1, "esm_if1_tiny")], ids=["esm2", "esm_if1"]
)
def test_fair_esms_own_loader_takes_the_file(write, name, tmp_path):
    """It is strict about every name and shape, and maps ESM-IF1's published names itself."""
    fair_esm.inverse_folding()
    data = torch.load(write(tmp_path / "tiny.pt"), weights_only=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regression weights not found")
        model, _ = fair_esm.esm().pretrained.load_model_and_alphabet_core(name, data, None)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("write", [write_tiny_esm2, write_tiny_esm_if1], ids=["esm2", "esm_if1"])
def test_a_seed_gives_the_same_bytes_and_another_seed_others(write, tmp_path):
    files = write(tmp_path / "a.pt"), write(tmp_path / "sub" / "b.pt"), write(tmp_path / "c.pt", seed=1)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert digests[0] == digests[1] != digests[2]
    assert not list(tmp_path.rglob("*.part"))


def test_esm2_is_stored_as_published(tmp_path):
    data = torch.load(write_tiny_esm2(tmp_path / "tiny.pt", num_layers=3, width=32), weights_only=False)
    assert data.keys() == {"cfg", "model"}
    cfg = data["cfg"]["model"]
    assert (cfg.encoder_layers, cfg.encoder_embed_dim, cfg.encoder_attention_heads) == (3, 32, 4)
    assert cfg.token_dropout is True
    assert {value.dtype for value in data["model"].values()} == {torch.float16}
    assert {name.split(".")[1] for name in data["model"]} == {"sentence_encoder", "lm_head"}
    for layer in range(3):
        stored = data["model"][f"encoder.sentence_encoder.layers.{layer}.self_attn.rot_emb.inv_freq"]
        assert torch.equal(stored, torch.tensor([1.0, 0.1, 0.01, 0.001]).half())


def test_esm_if1_is_stored_as_published(tmp_path):
    data = torch.load(write_tiny_esm_if1(tmp_path / "tiny.pt"), weights_only=False)
    assert data.keys() == {"args", "model"}
    assert data["args"].arch == "vt_medium_with_invariant_gvp"
    names = data["model"].keys()
    for name in (
        "encoder.gvp_encoder.W_v.0.wh.weight",
        "encoder.gvp_encoder.W_e.0.wh.weight",
        "encoder.gvp_encoder.embed_score.weight",
        "encoder.embed_scores.0.weight",
        "encoder.embed_ingraham_features.node_embedding.weight",
        "encoder.embed_gvp_in_local_frame.0.weight",
        "encoder.embed_features_in_local_frame.0.weight",
    ):
        assert name in names
    assert not any("embed_graph" in name or "embed_dihedrals" in name for name in names)
    assert any(name.startswith("decoder.") for name in names)


def test_widths_follow_the_arguments(tmp_path):
    assert load_esm2(str(write_tiny_esm2(tmp_path / "a.pt", width=32, num_heads=2))).width == 32
    assert load_esm_if1(str(write_tiny_esm_if1(tmp_path / "b.pt", width=32, num_gvp_layers=2))).width == 32


def test_widths_that_cannot_be_split_into_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="width 36 is not a multiple"):
        write_tiny_esm2(tmp_path / "a.pt", width=36, num_heads=8)
    with pytest.raises(ValueError, match="width 30 is not"):
        write_tiny_esm_if1(tmp_path / "b.pt", width=30, num_heads=4)


def probe_accuracy(rows: torch.Tensor, labels: np.ndarray, num_classes: int) -> float:
    """Least squares onto one-hot labels, fitted on the first half of the rows and scored on the second."""
    x = np.column_stack([rows.double().numpy(), np.ones(len(rows))])
    half = len(x) // 2
    solution, *_ = np.linalg.lstsq(x[:half], np.eye(num_classes)[labels[:half]], rcond=None)
    return float(((x[half:] @ solution).argmax(1) == labels[half:]).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_residue_identity_can_be_read_from_esm2_rows(tmp_path, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(20, size=(20, 60))
    backbone = np.full((60, 3, 3), np.nan, np.float32)
    proteins = [Protein("p", "A", "".join(LETTERS[i] for i in row), backbone) for row in labels]
    rows = torch.cat([r[1:-1] for r in load_esm2(str(write_tiny_esm2(tmp_path / "a.pt", seed=seed))).encode(proteins)])
    assert probe_accuracy(rows, labels.ravel(), 20) > 0.95
    assert probe_accuracy(rows, rng.permutation(labels.ravel()), 20) < 0.2, "the probe reads what is not there"


def place(a, b, c, length, angle, dihedral):
    """The point `length` from c, at `angle` b-c-d and `dihedral` a-b-c-d (degrees)."""
    angle, dihedral = math.radians(angle), math.radians(dihedral)
    axis = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, axis)
    normal /= np.linalg.norm(normal)
    x, y = -math.cos(angle), math.sin(angle)
    return c + length * (x * axis + y * (math.cos(dihedral) * np.cross(normal, axis) + math.sin(dihedral) * normal))


def ideal_backbone(phi_psi, rng):
    """N, CA, C from backbone angles with ideal bonds (Engh and Huber, 1991), in a random place and orientation."""
    atoms = [np.array([1.46, 0, 0]), np.zeros(3), 1.52 * np.array([math.cos(1.937), math.sin(1.937), 0])]
    for (_, psi), (phi, _) in zip(phi_psi, phi_psi[1:]):
        for length, angle, dihedral in ((1.33, 116.6, psi), (1.46, 121.7, 178.0), (1.52, 111.0, phi)):
            atoms.append(place(*atoms[-3:], length, angle, dihedral))
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    placed = np.array(atoms) @ (turn * np.linalg.det(turn)) + 30 * rng.normal(size=3)
    return placed.astype(np.float32).reshape(-1, 3, 3)


def helices_and_strands(rng, length=60):
    """A chain of helices and strands of 6 to 14 residues, angles spread by 6 degrees; labels 1 where helix."""
    labels = []
    state = int(rng.integers(2))
    while len(labels) < length:
        labels += [state] * int(rng.integers(6, 15))
        state = 1 - state
    labels = np.array(labels[:length])
    angles = np.where(labels[:, None] == 1, (-57.0, -47.0), (-120.0, 130.0)) + 6 * rng.normal(size=(length, 2))
    return labels, ideal_backbone(angles.tolist(), rng)


def test_the_hand_made_backbones_are_helix_and_strand():
    """Rise per residue 1.5 and 3.3 angstrom, 3.8 between neighbouring CA: textbook values."""
    rng = np.random.default_rng(0)
    for angles, rise in (((-57, -47), 1.5), ((-120, 130), 3.3)):
        alpha = ideal_backbone([angles] * 30, rng)[:, 1]
        assert np.linalg.norm(np.diff(alpha, axis=0), axis=1) == pytest.approx(3.8, abs=0.05)
        assert np.linalg.norm(alpha[-1] - alpha[0]) / 29 == pytest.approx(rise, abs=0.15)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_backbone_geometry_can_be_read_from_esm_if1_rows(tmp_path, seed):
    rng = np.random.default_rng(seed)
    labels, backbones = zip(*(helices_and_strands(rng) for _ in range(20)), strict=True)
    proteins = [Protein("p", "A", "A" * len(backbone), backbone) for backbone in backbones]
    encoder = load_esm_if1(str(write_tiny_esm_if1(tmp_path / "b.pt", seed=seed)))
    rows = torch.cat([r[1:-1] for r in encoder.encode(proteins)])
    labels = np.concatenate(labels)
    assert probe_accuracy(rows, labels, 2) > 0.95
    assert probe_accuracy(rows, rng.permutation(labels), 2) < 0.65, "the probe reads what is not there"
