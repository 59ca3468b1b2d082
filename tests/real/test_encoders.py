"""Tiny encoders over real PDB entries and AlphaFold models, held to fair-esm on the same coordinates."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from proteingpt.data.structure import StructureError, read_entry
from proteingpt.demo.encoders import write_tiny_esm2, write_tiny_esm_if1
from proteingpt.encoders import fair_esm, load_esm2, load_esm_if1
from proteingpt.encoders.check import check_encoders
from proteingpt.encoders.esm_if1 import inputs_of

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real structures are absent: {DATA}")

HARD = ("chainA_internal_gap", "chainA_incomplete_backbone", "insertion_codes", "noncanonical", "NMR", "zero_occupancy")


def manifest(folder):
    with open(DATA / folder / "manifest.tsv", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def chain_a(path):
    """Chain A, or None where the entry has none that is a polypeptide with coordinates."""
    try:
        return read_entry(path).protein("A")
    except StructureError:
        return None


@pytest.fixture(scope="module")
def proteins():
    """Every 25th entry, two of each hard kind, and four predicted models."""
    entries = manifest("pdb")
    chosen = {row["file"] for row in entries[::25]}
    for tag in HARD:
        chosen.update([row["file"] for row in entries if tag in row["tags"].split(",")][:2])
    paths = [DATA / "pdb" / file for file in sorted(chosen)]
    paths += [DATA / "alphafold" / row["file"] for row in manifest("alphafold")[:4]]
    found = [protein for protein in map(chain_a, paths) if protein is not None and len(protein) <= 700]
    assert len(found) >= 20 and any(protein.confidence is not None for protein in found)
    assert any(not protein.resolved.all() for protein in found)
    return found


def test_esm2_gives_finite_rows(proteins, tmp_path):
    encoder = load_esm2(str(write_tiny_esm2(tmp_path / "esm2.pt")))
    for protein, rows in zip(proteins, encoder.encode(proteins), strict=True):
        assert rows.shape == (len(protein) + 2, encoder.width) and rows.isfinite().all(), protein.key


def test_esm_if1_rows_equal_fair_esms_in_batches(proteins, tmp_path):
    path = write_tiny_esm_if1(tmp_path / "esm_if1.pt")
    encoder = load_esm_if1(str(path))
    data = torch.load(path, weights_only=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regression weights not found")
        model, alphabet = fair_esm.esm().pretrained.load_model_and_alphabet_core("esm_if1_tiny", data, None)
    convert = fair_esm.inverse_folding().util.CoordBatchConverter(alphabet)
    for protein, rows in zip(proteins, encoder.encode(proteins), strict=True):
        assert rows.shape == (len(protein) + 2, encoder.width) and rows.isfinite().all(), protein.key
        coords = np.where(protein.resolved[:, None, None], protein.backbone, np.inf).astype(np.float32)
        confidence = None if protein.confidence is None else protein.confidence.tolist()
        coords, confidence, _, _, padding = convert([(coords, confidence, None)])
        with torch.no_grad():
            wanted = model.eval().encoder(coords, padding, confidence)["encoder_out"][0][:, 0]
        assert ((rows - wanted).norm() / wanted.norm()) < 1e-5, protein.key


def test_published_embeddings_have_a_row_per_observed_residue_and_two_more():
    """Real output of the real weights: as many rows as our inputs have with coordinates, and those of BOS and EOS."""
    embeddings = {path.stem.lower(): path for path in (DATA / "proteinchat" / "pt").glob("*.pt")}
    both = [row for row in manifest("pdb") if row["pdb_id"] in embeddings]
    assert both, "no structure has a published embedding beside it"
    for row in both:
        rows = torch.load(embeddings[row["pdb_id"]], map_location="cpu", weights_only=True)
        coords, _ = inputs_of(read_entry(DATA / "pdb" / row["file"]).protein("A"))
        assert rows.shape == (np.isfinite(coords).all(axis=(1, 2)).sum() + 2, 1, 512), row["file"]
        assert rows.isfinite().all()


def test_the_golden_value_of_135l_is_compared_and_random_weights_do_not_reach_it(tmp_path):
    """Rows of the structure and of the published embedding correspond; only the values can differ."""
    path = write_tiny_esm_if1(tmp_path / "esm_if1.pt", width=512, num_heads=8, num_neighbors=30)
    *_, golden = check_encoders(
        esm2=None,
        esm_if1=str(path),
        structure=DATA / "pdb" / "135l.pdb.gz",
        embedding=DATA / "proteinchat" / "pt" / "135l.pt",
    )
    assert golden.check == "published embedding" and not golden.passed
    assert golden.detail.startswith("error ")
