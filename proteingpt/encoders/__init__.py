"""The two frozen protein encoders: ESM-2 reads the sequence, ESM-IF1 the backbone.

Both give one row per residue plus a BOS and an EOS row, as published. They are plain objects that hold a module, not
modules themselves: nothing of theirs may be gathered, cast, optimised or saved by the training engine.
"""

from proteingpt.encoders.esm2 import ESM2Encoder, load_esm2
from proteingpt.encoders.esm_if1 import ESMIF1Encoder, load_esm_if1
from proteingpt.encoders.weights import BadCheckpoint, UnknownWeights, WeightsNotFound

__all__ = [
    "BadCheckpoint",
    "ESM2Encoder",
    "ESMIF1Encoder",
    "UnknownWeights",
    "WeightsNotFound",
    "load_esm2",
    "load_esm_if1",
]
