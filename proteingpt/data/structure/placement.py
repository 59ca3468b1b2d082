"""Where the observed residues of a PDB-format chain stand in its SEQRES.

That format has no index into the deposited sequence. REMARK 465 settles most chains: observed and missing residues
merged by number spell SEQRES. Else the cheapest placement that keeps the order, by chain breaks, names and numbers.
"""

from dataclasses import dataclass

import numpy as np

from proteingpt.data.structure.atoms import Atoms, StructureError
from proteingpt.data.structure.residues import backbone_of, letter_of
from proteingpt.protein import UNKNOWN_RESIDUE

@dataclass(frozen=True)
class Place:
    """A residue of a PDB-format chain: its component, number (hybrid-36 decoded) and insertion code."""

    component: str
    number: int
    code: str


def bonds_of(atoms: Atoms, num_residues: int) -> np.ndarray:
    """float (num_residues,): 1 where residue i is bonded to the one before it, 0 where not, NaN where unknown.

    C-N below 2.5 angstrom (a peptide bond is 1.33), else CA-CA below 4.5 (3.8 trans, 2.9 cis).
    """
    backbone = backbone_of(atoms, num_residues)
    bonded = np.full(num_residues, np.nan)
    for before, after, limit in ((1, 1, 4.5), (2, 0, 2.5)):
        distance = np.linalg.norm(backbone[1:, after] - backbone[:-1, before], axis=1)
        bonded[1:] = np.where(np.isnan(distance), bonded[1:], distance < limit)
    return bonded


def place_residues(
    chain: str, observed: list[Place], bonded: np.ndarray, deposited: tuple[str, ...], missing: list[Place]
) -> np.ndarray:
    """int (num_observed,): row of each observed residue in the deposited sequence, -1 for one that is no part of it."""
    if tuple(place.component for place in observed) == deposited:
        return np.arange(len(observed))
    rows = _merge(observed, bonded, deposited, missing)
    return _embed(chain, observed, bonded, deposited) if rows is None else rows


def _merge(
    observed: list[Place], bonded: np.ndarray, deposited: tuple[str, ...], missing: list[Place]
) -> np.ndarray | None:
    """Observed and missing residues shuffled together so that they spell SEQRES; None if they cannot."""
    if len(observed) + len(missing) != len(deposited):
        return None
    rows: list[int] = []
    for row, component in enumerate(deposited):
        taken = row - len(rows)
        seen = observed[len(rows)] if len(rows) < len(observed) else None
        gone = missing[taken] if taken < len(missing) else None
        seen_fits, gone_fits = seen is not None and seen.component == component, gone is not None
        gone_fits = gone_fits and gone.component == component
        if seen_fits and gone_fits:
            follows = bool(rows) and rows[-1] == row - 1 and bonded[len(rows)] == 1
            seen_fits = follows or (seen.number, seen.code) <= (gone.number, gone.code)
        if seen_fits:
            rows.append(row)
        elif not gone_fits:
            return None
    return np.array(rows, dtype=np.int64)


# Costs of the alignment below, in units of an unexplained chain break. A letter may differ (a conflict, a
# microheterogeneity) where the rest agrees, a bonded pair is never torn for that, and numbering only decides ties.
_MISMATCH, _SAME_LETTER, _SKIP = 10.0, 1.0, 15.0
_TORN_BOND, _BREAK, _NO_BREAK = 20.0, 2.0, 1.0
_NUMBERING = 1.5


def _embed(chain: str, observed: list[Place], bonded: np.ndarray, deposited: tuple[str, ...]) -> np.ndarray:
    """Cheapest order-preserving placement of the observed residues in the deposited sequence (dynamic programming).

    best[p]: least cost so far with the last residue placed at position p, counted from 1; p = 0: none placed yet.
    """
    length = len(deposited)
    names = np.array(deposited)
    letters = np.array([letter_of(name, {}) for name in deposited])
    best = np.full(length + 1, np.inf)
    best[0] = 0.0
    origin = np.full((len(observed), length + 1), -1, dtype=np.int32)  # -1: the residue is skipped
    positions = np.arange(length + 1)
    for index, place in enumerate(observed):
        letter = letter_of(place.component, {})
        cost = np.where((letters == letter) & (letter != UNKNOWN_RESIDUE), _SAME_LETTER, _MISMATCH)
        cost[names == place.component] = 0.0
        torn = {1.0: _TORN_BOND}.get(bonded[index], _BREAK)
        step = place.number - observed[index - 1].number if index else 0

        # From the residue before, p - 1: free if bonded or unknown.
        arrive = np.full(length + 1, np.inf)
        arrive[1:] = best[:-1] + (_NO_BREAK if bonded[index] == 0 else 0.0) - (_NUMBERING if step == 1 else 0.0)
        arrive[1] = min(arrive[1], best[0])
        source = positions - 1
        # From anywhere before that: the cheapest, by a running minimum; the start of the chain costs nothing.
        running = np.minimum.accumulate(best + np.where(positions > 0, torn, 0.0))
        where = np.maximum.accumulate(np.where(best + np.where(positions > 0, torn, 0.0) == running, positions, 0))
        _improve(arrive, source, 2, running[:-2], where[:-2])
        if 1 < step < length:  # from exactly as far away as the numbers say
            _improve(arrive, source, step + 1, best[1:-step] + torn - _NUMBERING, positions[1:-step])

        skipped = best + _SKIP
        placed = np.full(length + 1, np.inf)
        placed[1:] = arrive[1:] + cost
        origin[index] = np.where(placed <= skipped, source, -1)
        best = np.minimum(placed, skipped)
    rows = _trace(origin, int(best.argmin()))
    _check_placement(chain, observed, deposited, rows)
    return rows


def _improve(arrive: np.ndarray, source: np.ndarray, start: int, cost: np.ndarray, origin: np.ndarray) -> None:
    better = cost < arrive[start:]
    arrive[start:][better] = cost[better]
    source[start:][better] = origin[better]


def _trace(origin: np.ndarray, position: int) -> np.ndarray:
    rows = np.full(len(origin), -1, dtype=np.int64)
    for index in range(len(origin) - 1, -1, -1):
        before = origin[index, position]
        if before >= 0:
            rows[index] = position - 1
            position = int(before)
    return rows


def _check_placement(chain: str, observed: list[Place], deposited: tuple[str, ...], rows: np.ndarray) -> None:
    def fits(place: Place, row: int) -> bool:
        return row >= 0 and (
            deposited[row] == place.component or letter_of(deposited[row], {}) == letter_of(place.component, {})
        )

    wrong = [place for place, row in zip(observed, rows.tolist(), strict=True) if not fits(place, row)]
    if len(wrong) > max(2, len(observed) // 10):
        first = wrong[0]
        raise StructureError(
            f"SEQRES of chain {chain!r} ({len(deposited)} residues) does not fit its coordinates: {len(wrong)} of "
            f"{len(observed)} observed residues have no place in it, the first is {first.component} "
            f"{first.number}{first.code}"
        )
