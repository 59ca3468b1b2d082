"""The two frozen encoders by name: widths, bytes and cost, without their weights."""

import re
from dataclasses import dataclass
from pathlib import Path

from proteingpt.config import NO_ENCODER, EncodersConfig

# Published ESM-2: width and parameters by size. A residue costs 2 FLOPs for each parameter.
ESM2_SHAPES = {
    "8M": (320, 7.5e6), "35M": (480, 33.5e6), "150M": (640, 148e6), "650M": (1280, 651e6), "3B": (2560, 2.839e9),
    "15B": (5120, 15.1e9),
}  # fmt: skip
# ESM-IF1's encoder; FLOPs per residue are those of our forward, which halves the published one's 2.04 G.
ESM_IF1_WIDTH, ESM_IF1_PARAMETERS, ESM_IF1_FLOPS = 512, 107_993_030, 1.02e9
SCRATCH_BYTES = 0.2e9  # of one long protein at a time: ESM-IF1 takes 0.1 GB at 1,000 residues


@dataclass(frozen=True)
class EncoderShape:
    """widths: of the structure's and the sequence's rows, 0 for one that is left out. bytes: of both on a device."""

    widths: tuple[int, int]
    element: int
    bytes: float
    flops_per_residue: float

    @property
    def number(self) -> int:
        return sum(width > 0 for width in self.widths)

    def rows_bytes(self, residues: float) -> float:
        return residues * sum(self.widths) * self.element


def esm2_shape(name: str | None) -> tuple[int, float]:
    """(width, parameters). A file counts as float16 of the 3B model's width, for want of opening it; None as the 3B
    model."""
    if name == NO_ENCODER:
        return 0, 0.0
    found = re.search(r"esm2_t\d+_(\d+[MB])", name or "esm2_t36_3B")
    if found and found[1] in ESM2_SHAPES:
        return ESM2_SHAPES[found[1]]
    width, parameters = ESM2_SHAPES["3B"]
    return width, Path(name).stat().st_size / 2 if Path(name).is_file() else parameters


def encoder_shape(config: EncodersConfig) -> EncoderShape:
    element = 4 if config.dtype == "float32" else 2
    width, parameters = esm2_shape(config.esm2)
    flops, structure = 2 * parameters, 0
    if config.esm_if1 != NO_ENCODER:
        structure, parameters, flops = ESM_IF1_WIDTH, parameters + ESM_IF1_PARAMETERS, flops + ESM_IF1_FLOPS
    return EncoderShape((structure, width), element, parameters * element + SCRATCH_BYTES, flops)
