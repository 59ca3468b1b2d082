"""The real command on tiny weights, a hand-made structure file, and an embedding by fair-esm's own code."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from proteingpt.demo.encoders import write_tiny_esm2, write_tiny_esm_if1
from proteingpt.encoders import fair_esm
from proteingpt.encoders.check import check_encoders

REPOSITORY = Path(__file__).parents[2]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/check_encoders.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)


def pdb_text(backbone: np.ndarray) -> str:
    """Alanines in chain A with the coordinates (L, 3, 3) of N, CA and C."""
    lines = [f"SEQRES   1 A {len(backbone):4d} " + " ALA" * len(backbone)]
    for residue, atoms in enumerate(backbone, 1):
        for number, (name, (x, y, z)) in enumerate(zip(("N", "CA", "C"), atoms), 3 * residue):
            lines.append(
                f"ATOM  {number:5d}  {name:<3s} ALA A{residue:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 10.00"
                f"           {name[0]}"
            )
    return "\n".join(["HEADER    TEST                                    02-JAN-94   1ABC", *lines, "TER", "END", ""])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights, the structure of ten residues, and its embedding as it is published: (L + 2, 1, width)."""
    folder = tmp_path_factory.mktemp("check")
    esm2, esm_if1 = write_tiny_esm2(folder / "esm2.pt"), write_tiny_esm_if1(folder / "esm_if1.pt")
    step = np.array([2.4, 1.8, 1.6])
    turn = np.random.default_rng(0).normal(scale=0.4, size=(10, 3, 3))
    backbone = (np.arange(10)[:, None, None] * step + np.arange(3)[None, :, None] * 1.2 + turn).round(3)
    structure = folder / "1abc.pdb"
    structure.write_text(pdb_text(backbone))
    data = torch.load(esm_if1, weights_only=False)
    fair_esm.inverse_folding()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regression weights not found")
        model, alphabet = fair_esm.esm().pretrained.load_model_and_alphabet_core("esm_if1_tiny", data, None)
    convert = fair_esm.inverse_folding().util.CoordBatchConverter(alphabet)
    coords, confidence, _, _, padding = convert([(backbone.astype(np.float32), None, None)])
    with torch.no_grad():
        rows = model.eval().encoder(coords, padding, confidence)["encoder_out"][0]
    torch.save(rows.requires_grad_(True), folder / "1abc.pt")
    return {"esm2": esm2, "esm_if1": esm_if1, "structure": structure, "embedding": folder / "1abc.pt"}


def test_good_weights_and_their_golden_value_pass(files):
    done = run(
        "--esm2", files["esm2"], "--esm-if", files["esm_if1"],
        "--structure", files["structure"], "--embedding", files["embedding"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all(line.startswith("ok ") for line in lines)
    for check in ("names and shapes", "rotary frequencies", "finite rows", "equal to fair-esm", "published embedding"):
        assert any(check in line for line in lines)


def test_a_wrong_golden_value_is_named_and_sets_the_exit_code(files, tmp_path):
    rows = torch.load(files["embedding"], weights_only=True).detach()
    torch.save(rows * 1.1, tmp_path / "other.pt")
    done = run("--esm-if", files["esm_if1"], "--structure", files["structure"], "--embedding", tmp_path / "other.pt")
    bad = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert done.returncode == 1 and len(bad) == 1, done.stderr
    assert "published embedding" in bad[0] and "error 9.1e-02, at most 1e-02" in bad[0]


def test_a_golden_value_of_another_chain_is_named(files, tmp_path):
    torch.save(torch.load(files["embedding"], weights_only=True).detach()[1:], tmp_path / "short.pt")
    torch.save({"rows": 1}, tmp_path / "dict.pt")
    reasons = {"short.pt": "(12, 64) rows from 1abc.pdb, (11, 64) in short.pt", "dict.pt": "holds a dict"}
    for name, reason in reasons.items():
        *_, golden = check_encoders(
            esm2=None, esm_if1=str(files["esm_if1"]), structure=files["structure"], embedding=tmp_path / name
        )
        assert not golden.passed and reason in golden.detail


def test_nothing_to_check_is_a_message(files):
    done = run()
    assert done.returncode == 1 and "check_encoders: nothing to check" in done.stderr and "Traceback" not in done.stderr
