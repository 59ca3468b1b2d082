"""Proteins longer than data.max_residues, cut to a window of them: drawn by hash in training, the middle in evaluation.

Coordinates and sequence are cut alike, and the window is in the id, so that nothing that remembers a protein by its key
takes one window for another. Answers stay those of the whole protein: one that tells its length is wrong of a window.
"""

import dataclasses

import numpy as np

from proteingpt.data.plan import mix
from proteingpt.protein import Protein


def window_start(num_residues: int, length: int, sample_id: int, draw: tuple[int, int] | None) -> int:
    """Where a window of `length` residues begins: 0 .. num_residues - length, by hash of (seed, epoch, id). draw:
    (seed, epoch), or None for the middle."""
    spare = num_residues - length
    if draw is None:
        return spare // 2
    return int(mix(np.array([sample_id], np.uint64), *draw, 7)[0]) % (spare + 1)


def crop(protein: Protein, start: int, length: int) -> Protein:
    """`length` residues from `start` on."""
    kept = slice(start, start + length)
    return dataclasses.replace(
        protein,
        id=f"{protein.id}[{start}:{start + length}]",
        sequence=protein.sequence[kept],
        backbone=protein.backbone[kept],
        confidence=None if protein.confidence is None else protein.confidence[kept],
    )
