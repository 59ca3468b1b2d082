"""The types every room shares: a protein, what its file says of it, and the questions asked about it.

Units are angstrom everywhere. A residue that was not resolved stays in the sequence and has NaN coordinates, so that
row i of every per-residue array is letter i of the sequence.
"""

from dataclasses import dataclass, field

import numpy as np

BACKBONE_ATOMS = ("N", "CA", "C")
UNKNOWN_RESIDUE = "X"

# Each encoder adds a begin-of-sequence and an end-of-sequence row, and the soft prompt keeps them (as published).
ENCODER_EXTRA_ROWS = 2


@dataclass(frozen=True)
class Protein:
    """One chain.

    id: entry identifier in lower case, as in `1cbs`.
    chain: author chain id, as printed in the paper of the structure, case kept.
    sequence: the deposited one, one letter per residue, L letters.
    backbone: float32 (L, 3, 3), angstrom, atoms in the order N CA C, NaN where unresolved.
    confidence: float32 (L,) in 0..1, the pLDDT / 100 of a predicted structure; None for an experimental one.
    """

    id: str
    chain: str
    sequence: str
    backbone: np.ndarray
    confidence: np.ndarray | None = None

    def __post_init__(self):
        length = len(self.sequence)
        if length == 0:
            raise ValueError(f"protein {self.key}: the sequence is empty")
        if self.backbone.shape != (length, 3, 3) or self.backbone.dtype != np.float32:
            raise ValueError(
                f"protein {self.key}: backbone is {self.backbone.dtype} {self.backbone.shape}, "
                f"wanted float32 ({length}, 3, 3) for a sequence of {length} residues"
            )
        if self.confidence is not None and self.confidence.shape != (length,):
            raise ValueError(f"protein {self.key}: confidence has shape {self.confidence.shape}, wanted ({length},)")

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def key(self) -> str:
        """Name of the sample in a shard. No dot may occur in it: the tar convention splits there."""
        return f"{self.id}_{self.chain}"

    @property
    def resolved(self) -> np.ndarray:
        """bool (L,): residues with all three backbone atoms."""
        return np.isfinite(self.backbone).all(axis=(1, 2))


@dataclass(frozen=True)
class Facts:
    """What a structure file says of its entry, beside the coordinates. None or () where it does not say.

    methods: as deposited, `X-RAY DIFFRACTION`; resolution in angstrom; organisms: scientific names of the polymer
    sources, each once, in file order; year: of the deposition; num_chains: polymer chains, by author id.
    """

    title: str | None = None
    keywords: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    resolution: float | None = None
    organisms: tuple[str, ...] = ()
    year: int | None = None
    num_models: int | None = None
    num_chains: int | None = None
    num_polymer_entities: int | None = None


@dataclass(frozen=True)
class Turn:
    """One question and its answer. Stage 1 is the same thing with an empty question and the description as answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """What one shard entry holds. metadata: what the entry was made from, JSON values only."""

    protein: Protein
    description: str
    turns: tuple[Turn, ...]
    metadata: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.protein.key


def prefix_length(num_residues: int) -> int:
    """Positions a protein takes in the prompt: the rows of ESM-IF1, then those of ESM-2.

    Exact because neither is pooled (as published); prompts reserve this many placeholders before any model runs.
    """
    return 2 * (num_residues + ENCODER_EXTRA_ROWS)
