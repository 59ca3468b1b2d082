"""The types every room shares: a protein, what its file says of it, and the questions asked about it.

Units are angstrom everywhere. A residue that was not resolved stays in the sequence and has NaN coordinates, so that
row i of every per-residue array is letter i of the sequence.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BACKBONE_ATOMS = ("N", "CA", "C")
UNKNOWN_RESIDUE = "X"

# An entry's id as wwPDB extends it; those that begin like this one are the old ids of four letters.
_EXTENDED_ID = re.compile(r"pdb_0000([0-9a-z]{4})")

# Each encoder adds a begin-of-sequence and an end-of-sequence row, and the soft prompt keeps them (as published).
ENCODER_EXTRA_ROWS = 2


def short_id(name: str) -> str:
    """An entry's id as everything here knows it: in lower case, and `pdb_00001abc`, wwPDB's new form, as `1abc`."""
    name = name.lower()
    extended = _EXTENDED_ID.fullmatch(name)
    return extended[1] if extended else name


@dataclass(frozen=True)
class Protein:
    """One chain.

    id: entry identifier as `short_id` gives it, `1cbs`.
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
    """What is known of an entry beside the coordinates: from its file, or from RCSB's Data API. None where unknown.

    Counts are of the deposited entry, named after RCSB's `rcsb_entry_info`; a tuple that is None is unknown, an empty
    one is known to be empty.
    """

    title: str | None = None
    keywords: tuple[str, ...] | None = None  # free text, without the classification
    classification: str | None = None  # struct_keywords.pdbx_keywords, as deposited
    methods: tuple[str, ...] | None = None  # as deposited, `X-RAY DIFFRACTION`
    methodology: str | None = None  # `experimental` or `computational`
    resolution: float | None = None  # angstrom
    wavelength: float | None = None  # angstrom, of the radiation
    organisms: tuple[str, ...] | None = None  # scientific names, each once, in file order
    year: int | None = None  # of the deposition
    publication_year: int | None = None  # of the primary citation
    software: tuple[str, ...] | None = None
    molecular_weight: float | None = None  # kDa, polymers and non-polymers without solvent

    num_models: int | None = None
    num_assemblies: int | None = None
    num_chains: int | None = None  # polymer chains, by author id
    num_entities: int | None = None
    num_polymer_entities: int | None = None
    num_nonpolymer_entities: int | None = None
    num_branched_entities: int | None = None
    num_solvent_entities: int | None = None
    num_dna_entities: int | None = None
    num_rna_entities: int | None = None
    num_hybrid_entities: int | None = None
    num_nucleic_acid_entities: int | None = None

    num_heavy_atoms: int | None = None
    num_hydrogen_atoms: int | None = None
    num_solvent_atoms: int | None = None
    num_polymer_monomers: int | None = None
    num_unmodeled_monomers: int | None = None
    num_covalent_bonds: int | None = None  # between molecules
    num_metal_bonds: int | None = None
    num_cis_peptides: int | None = None

    polymer_composition: str | None = None  # `heteromeric protein`, ...
    polymer_type: str | None = None  # `Protein (only)`, ...
    nucleic_acid_type: str | None = None
    nonpolymer_components: tuple[str, ...] | None = None  # bound ones, by component id


class Turn(NamedTuple):
    """One question and its answer. Stage 1 is the same thing with an empty question and the description as answer. A
    tuple, as millions are read of it and a frozen dataclass costs more to make."""

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


def part_length(num_rows, num_tokens: int | None):
    """Positions that the rows of one encoder take, ints or arrays: as many, or a resampler's fixed number if there are
    any."""
    return num_rows if num_tokens is None else num_tokens * (num_rows > 0)


@dataclass(frozen=True)
class PrefixLength:
    """Positions a protein takes in the prompt: those of ESM-IF1, then those of ESM-2, or of one of them.

    A function of its length alone, so that prompts reserve this many placeholders before any model runs. num_tokens:
    what a resampler makes of the rows of each encoder; None where every row is kept, as published.
    """

    num_encoders: int = 2
    num_tokens: int | None = None

    def __call__(self, num_residues):
        """Of a number of residues, or an array of them."""
        return self.num_encoders * part_length(num_residues + ENCODER_EXTRA_ROWS, self.num_tokens)


prefix_length = PrefixLength()
