"""The picture beside the conversation, for real entries: what is drawn is the chain that the model is given."""

from pathlib import Path

import gemmi
import numpy as np
import pytest

from proteingpt.data.structure import StructureError
from proteingpt.inference import picture, subject

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILES = [
    *sorted((DATA / "pdb").glob("*.gz"))[::25],
    *sorted((DATA / "alphafold").glob("*"))[:2],
    DATA / "pdb" / "5mr6.cif.gz",
]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")
def test_the_backbone_that_is_drawn_is_the_model_s():
    """Read back by gemmi, to the three digits of the format."""
    num_drawn = 0
    for path in FILES:
        if path.suffix == ".tsv":
            continue
        try:
            entry, protein = subject.read_structure(path)
        except StructureError:
            continue  # no protein in it: nothing to draw
        chain = gemmi.read_pdb_string(picture.pdb_text(entry, protein.chain))[0]["A"]
        found = np.full(protein.backbone.shape, np.nan, np.float32)
        for residue in chain:
            for atom in residue:
                if atom.name in ("N", "CA", "C"):
                    found[residue.seqid.num - 1, ("N", "CA", "C").index(atom.name)] = atom.pos.tolist()
        np.testing.assert_allclose(found, protein.backbone, atol=1e-3, err_msg=str(path))
        num_drawn += 1
    assert num_drawn >= 15
