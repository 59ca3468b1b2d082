"""The picture shows what the model is given: read back by gemmi."""

import gemmi
import numpy as np
from structure_files import everything

from proteingpt.inference import picture, subject


def drawn(path, chain=None):
    entry, protein = subject.read_structure(path, chain)
    return protein, gemmi.read_pdb_string(picture.pdb_text(entry, chain or protein.chain))[0]


def backbone(chain: gemmi.Chain, length: int) -> np.ndarray:
    found = np.full((length, 3, 3), np.nan, np.float32)
    for residue in chain:
        for atom in residue:
            if atom.name in ("N", "CA", "C"):
                found[residue.seqid.num - 1, ("N", "CA", "C").index(atom.name)] = atom.pos.tolist()
    return found


def test_the_chain_asked_about_is_a_numbered_as_its_sequence(tmp_path):
    """With a gap, altlocs of which one was taken, a modified residue, and another chain beside it."""
    (tmp_path / "x.cif").write_text(everything()[0])
    for asked, other in (("A", "B"), ("B", "A")):
        protein, model = drawn(tmp_path / "x.cif", asked)
        np.testing.assert_array_equal(backbone(model["A"], len(protein)), protein.backbone)
        theirs = drawn(tmp_path / "x.cif", other)[0]
        np.testing.assert_array_equal(backbone(model["B"], len(theirs)), theirs.backbone)
        assert len(model) == 2


def angle(*positions: gemmi.Position) -> float:
    """At the second of three, degrees."""
    first, middle, last = (np.array(position.tolist()) for position in positions)
    a, b = first - middle, last - middle
    return float(np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))))


def test_oxygens_that_a_ribbon_needs_are_placed_where_there_are_none(demo_assets):
    """Against the angles of Engh & Huber (1991), CA-C-O 120.8 and O-C-N 123.0 degrees, in the plane of the peptide."""
    assert " O  " not in (demo_assets / "example.pdb").read_text()
    chain = drawn(demo_assets / "example.pdb")[1]["A"]
    for here, after in zip(list(chain)[:-1], list(chain)[1:]):
        ca, c, o, n = (residue[name][0].pos for residue, name in ((here, "CA"), (here, "C"), (here, "O"), (after, "N")))
        assert abs(c.dist(o) - 1.231) < 2e-3
        angles = [angle(end, c, o) for end in (ca, n)]
        assert abs(angles[0] - 120.8) < 2.5 and abs(angles[1] - 123.0) < 2.5
        assert sum(angles) + angle(ca, c, n) > 359.9  # three angles that close: one plane


def test_elements_are_those_of_a_polymer(demo_assets):
    _, model = drawn(demo_assets / "example.pdb")
    elements = {atom.name: atom.element.name for residue in model["A"] for atom in residue}
    assert elements["CA"] == "C" and elements["N"] == "N"
    assert [picture.element_of(name) for name in ("SE", "1HB", "HG1", "OD2", "SD", "O5'")] == [
        "SE",
        "H",
        "H",
        "O",
        "S",
        "O",
    ]
