"""The chains that were read, as a text in PDB format for the viewer: what the user sees is what the model was given.

The chain that is asked about is `A` there, whatever it is called in the file, its residues numbered as in its sequence.
A viewer needs oxygens for a ribbon: where the file has none they are placed, for the drawing alone.
Given up: ligands, water, hydrogens, and what is beyond the format's 99,999 atoms.
"""

import dataclasses
import string

import numpy as np

from proteingpt.data.structure import Entry
from proteingpt.data.structure.atoms import Atoms, Polymer, take
from proteingpt.data.structure.entry import choose_polymer
from proteingpt.data.structure.residues import backbone_of, one_conformer

ASKED = "A"
OTHERS = string.ascii_uppercase[1:] + string.ascii_lowercase + string.digits
MAX_ATOMS, MAX_RESIDUES = 99_999, 9_999
BACKBONE = ("N", "CA", "C", "O")
BOND_C_O = 1.231  # angstrom, Engh & Huber (1991) Acta Cryst. A47:392-400
MAX_PEPTIDE_BOND = 2.0  # angstrom, generous: further apart there is a gap


def pdb_text(entry: Entry, chain: str) -> str:
    """PDB format of the chain that `entry.protein(chain)` gives, then of as many others as there is room for. A pLDDT
    stands in the B factors, of 0 to 100."""
    asked = choose_polymer(entry.polymers, chain)
    others = [polymer for polymer in entry.polymers if polymer is not asked]
    lines: list[str] = []
    for polymer, letter in zip([asked, *others], ASKED + OTHERS):
        atoms = shown_atoms(polymer)
        if len(polymer.components) > MAX_RESIDUES or len(lines) + len(atoms.name) > MAX_ATOMS:
            continue
        atoms = dataclasses.replace(atoms, b_factor=atoms.b_factor * (100 / (entry.plddt_scale or 100)))
        lines += atom_lines(atoms, letter, first=len(lines) + 1)
    return "\n".join([*lines, "END", ""])


def shown_atoms(polymer: Polymer) -> Atoms:
    """One conformer without hydrogens, in the order of residues; of a very large chain the backbone alone."""
    atoms = one_conformer(polymer.atoms, polymer.components)
    kept = np.array([element_of(name) not in ("H", "D") for name in atoms.name.tolist()], bool)
    kept &= np.isfinite(atoms.position).all(axis=1) & (np.abs(atoms.position) < 9_999).all(axis=1)  # the columns' room
    if kept.sum() > MAX_ATOMS // 2:
        kept &= np.isin(atoms.name, BACKBONE)
    shown = take(atoms, kept)
    if polymer.is_peptide:
        shown = with_oxygens(shown, len(polymer.components))
    return take(shown, np.argsort(shown.residue, kind="stable"))


def with_oxygens(atoms: Atoms, length: int) -> Atoms:
    """An O at each residue without one, where it and the next have their backbone: in the plane of CA, C and the next
    N, opposite to both."""
    n, ca, c = backbone_of(atoms, length).swapaxes(0, 1).astype(np.float64)  # (L, 3) each
    next_n = np.concatenate([n[1:], np.full((1, 3), np.nan)])
    away = -sum((end - c) / np.linalg.norm(end - c, axis=1, keepdims=True) for end in (ca, next_n))
    placed = c + BOND_C_O * away / np.linalg.norm(away, axis=1, keepdims=True)
    bonded = np.linalg.norm(next_n - c, axis=1) < MAX_PEPTIDE_BOND
    absent = bonded & np.isfinite(placed).all(axis=1)
    absent[atoms.residue[np.isin(atoms.name, ("O", "OXT"))]] = False
    beside = np.flatnonzero((atoms.name == "C") & absent[atoms.residue])  # whose other columns an O takes over
    more = dataclasses.replace(
        take(atoms, beside), name=np.full(len(beside), "O"), position=placed[atoms.residue[beside]].astype(np.float32)
    )
    both = {name: np.concatenate([getattr(atoms, name), getattr(more, name)]) for name in Atoms.__dataclass_fields__}
    return Atoms(**both)


def element_of(name: str) -> str:
    """Of an atom of a polymer: `CA` is a carbon there, `1HB` a hydrogen, `SE` selenium."""
    return "SE" if name == "SE" else name.lstrip(string.digits + "'\" ")[:1]


def atom_lines(atoms: Atoms, letter: str, first: int) -> list[str]:
    """ATOM records, by the columns of the PDB format, version 3.30."""
    rows = zip(
        atoms.name.tolist(), atoms.component.tolist(), (atoms.residue + 1).tolist(), atoms.position.tolist(),
        np.clip(atoms.b_factor, 0, 999).tolist(), strict=True,
    )  # fmt: skip
    return [
        f"ATOM  {serial:5d} {name if len(name) > 3 or len(element_of(name)) > 1 else ' ' + name:<4.4} {component:>3.3} "
        f"{letter}{residue:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00{b:6.2f}          {element_of(name):>2}"
        for serial, (name, component, residue, (x, y, z), b) in enumerate(rows, first)
    ]
