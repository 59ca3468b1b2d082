"""From atoms to a protein's arrays: one letter for a residue, one conformer, the backbone, the confidence.

A modified residue takes the letter of its parent, by the file's own word first and then by the wwPDB's component
dictionary (which comes with biotite). Given up: conformers other than the one taken.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from biotite.structure.info import amino_acid_names, link_type, nucleotide_names, one_letter_code

from proteingpt.data.structure.atoms import Atoms, StructureError, take
from proteingpt.protein import BACKBONE_ATOMS, UNKNOWN_RESIDUE

# Beside the twenty: the ambiguous and the rare residues that have a letter of their own in FASTA and in ESM's alphabet.
_LETTERS = dict(
    ALA="A", ARG="R", ASN="N", ASP="D", CYS="C", GLN="Q", GLU="E", GLY="G", HIS="H", ILE="I", LEU="L", LYS="K",
    MET="M", PHE="F", PRO="P", SER="S", THR="T", TRP="W", TYR="Y", VAL="V", SEC="U", PYL="O", ASX="B", GLX="Z",
    UNK=UNKNOWN_RESIDUE,
)  # fmt: skip
LETTER_COMPONENTS = {letter: name for name, letter in _LETTERS.items()}


def letter_of(component: str, parents: dict[str, frozenset[str]]) -> str:
    """One letter for one residue. The file's own word on the parent comes first, then the component dictionary."""
    if component in _LETTERS:
        return _LETTERS[component]
    of_file = parents.get(component, frozenset())
    if len(of_file) > 1:
        return UNKNOWN_RESIDUE
    return next((_LETTERS[parent] for parent in of_file if parent in _LETTERS), _dictionary_letter(component))


@lru_cache(maxsize=None)
def _dictionary_letter(component: str) -> str:
    """Letter by the wwPDB's Chemical Component Dictionary; X for a chromophore of several residues (`TYG`)."""
    letter = one_letter_code(component) if "PEPTIDE" in (link_type(component) or "").upper() else None
    return letter if letter is not None and len(letter) == 1 else UNKNOWN_RESIDUE


@lru_cache(maxsize=None)
def is_amino_acid(component: str) -> bool:
    return component in _LETTERS or component in amino_acid_names()


@lru_cache(maxsize=None)
def is_nucleotide(component: str) -> bool:
    return component in nucleotide_names()


def is_peptide(components: Iterable[str]) -> bool:
    """Where the file does not say: the larger number of residues decides."""
    components = list(components)
    num_amino = sum(map(is_amino_acid, components))
    return num_amino > 0 and num_amino >= sum(map(is_nucleotide, components))


def _backbone_column(atoms: Atoms) -> np.ndarray:
    """int (n,): 0, 1, 2 for N, CA, C; -1 for any other atom."""
    column = np.full(len(atoms.name), -1)
    for index, name in enumerate(BACKBONE_ATOMS):
        column[atoms.name == name] = index
    return column


def one_conformer(atoms: Atoms, components: tuple[str, ...]) -> Atoms:
    """Keep, at each residue, the atoms of the deposited (first) component and of one altloc, beside those without.

    The altloc is the one that leaves most of N, CA, C in place, then of the largest summed occupancy, then the first in
    the file. Any character but blank is an altloc: in 1K6P they are digits.
    """
    wanted = np.array(components)[atoms.residue]
    keep = np.ones(len(wanted), dtype=bool)
    other = atoms.component != wanted
    for residue in np.unique(atoms.residue[other]):
        here = atoms.residue == residue
        # Where the file lists one component and models only another, what was modelled is all there is.
        if not other[here].all():
            keep[here & other] = False

    column = _backbone_column(atoms)
    alternative = keep & (atoms.altloc != "")
    rows_by_residue: dict[int, list[int]] = {}
    for row in np.flatnonzero(alternative):
        rows_by_residue.setdefault(int(atoms.residue[row]), []).append(row)
    if rows_by_residue:
        common = keep & ~alternative & (column >= 0)
        present = np.zeros((len(components), 3), dtype=bool)
        present[atoms.residue[common], column[common]] = True
        for residue, rows in rows_by_residue.items():
            chosen = _choose_altloc(atoms, column, rows, present[residue])
            keep[[row for row in rows if atoms.altloc[row] != chosen]] = False
    return take(atoms, keep)


def _choose_altloc(atoms: Atoms, column: np.ndarray, rows: list[int], present: np.ndarray) -> str:
    by_altloc: dict[str, list[int]] = {}
    for row in rows:
        by_altloc.setdefault(str(atoms.altloc[row]), []).append(row)

    def rank(altloc: str) -> tuple[int, float]:
        own = by_altloc[altloc]
        num_backbone = len({int(c) for c in column[own] if c >= 0} | set(np.flatnonzero(present).tolist()))
        # Rounded, so that sums of the same decimals tie whatever their order.
        return num_backbone, round(float(atoms.occupancy[own].sum(dtype=np.float64)), 4)

    return max(by_altloc, key=rank)  # the first of equals


def take(atoms: Atoms, rows: np.ndarray) -> Atoms:
    return Atoms(**{name: getattr(atoms, name)[rows] for name in Atoms.__dataclass_fields__})


def backbone_of(atoms: Atoms, length: int) -> np.ndarray:
    column = _backbone_column(atoms)
    rows = np.flatnonzero(column >= 0)[::-1]  # of two atoms of one name the first in the file is written last
    backbone = np.full((length, 3, 3), np.nan, dtype=np.float32)
    backbone[atoms.residue[rows], column[rows]] = atoms.position[rows]
    return backbone


def confidence_of(atoms: Atoms, length: int, scale: float | None) -> np.ndarray | None:
    if scale is None:
        return None
    rows = np.concatenate([np.flatnonzero(atoms.name != "CA"), np.flatnonzero(atoms.name == "CA")])
    confidence = np.zeros(length, dtype=np.float32)
    confidence[atoms.residue[rows]] = atoms.b_factor[rows] / scale
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise StructureError(
            f"a predicted structure whose B factors go from {atoms.b_factor.min():g} to {atoms.b_factor.max():g}; "
            f"wanted its pLDDT there, in 0 to {scale:g}"
        )
    return confidence
