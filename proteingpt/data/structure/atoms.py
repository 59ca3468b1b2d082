"""What every format is read into: the atoms of one chain, column by column, and the chain they belong to."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Beyond any molecule: what is further out is damage.
MAX_COORDINATE = 1e6


class StructureError(ValueError):
    """A structure file that cannot be used: names the file, what was found and what was wanted."""


@dataclass(frozen=True)
class Atoms:
    """Atoms of one chain, first model, n of them. residue: int (n,), row of the deposited sequence."""

    residue: np.ndarray
    name: np.ndarray
    component: np.ndarray
    altloc: np.ndarray
    occupancy: np.ndarray
    position: np.ndarray
    b_factor: np.ndarray


@dataclass(frozen=True)
class Polymer:
    """One polymer chain. label is None in PDB format; components: the deposited residue names, first of each place."""

    chain: str
    label: str | None
    is_peptide: bool
    components: tuple[str, ...]
    atoms: Atoms


def unique(values: Iterable) -> tuple:
    return tuple(dict.fromkeys(values))


def runs(*columns: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the stretches where none of the columns changes."""
    if len(columns[0]) == 0:
        return []
    changes = np.zeros(len(columns[0]) - 1, dtype=bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(columns[0])]
    return list(zip(edges[:-1], edges[1:], strict=True))


def take(atoms: Atoms, rows: np.ndarray) -> Atoms:
    return Atoms(**{name: getattr(atoms, name)[rows] for name in Atoms.__dataclass_fields__})


def check_positions(position: np.ndarray) -> None:
    """Unresolved coordinates are NaN (`?` in mmCIF); infinite or absurd ones are damage."""
    wrong = np.isinf(position) | (np.abs(position) > MAX_COORDINATE)
    if wrong.any():
        raise StructureError(
            f"coordinate {position[wrong][0]:g} is beyond reason (over {MAX_COORDINATE:g} angstrom): damaged, fetch it "
            "again"
        )


def group_residues(key: np.ndarray, name: np.ndarray, altloc: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Residues by their number and insertion code: index for each atom, and the first atom of each residue.

    Atoms of one residue need not be neighbours (altlocs in a later block), but a number that comes back with an atom
    that is already there, outside any altloc, is another residue.
    """
    residue = np.empty(len(key), dtype=np.int64)
    latest: dict[str, int] = {}
    names: list[set[str]] = []
    first: list[int] = []
    for start, stop in runs(key):
        own = set(name[start:stop][altloc[start:stop] == ""].tolist())
        index = latest.get(str(key[start]))
        if index is None or names[index] & own:
            index = latest[str(key[start])] = len(first)
            first.append(start)
            names.append(set())
        names[index] |= own
        residue[start:stop] = index
    return residue, first
