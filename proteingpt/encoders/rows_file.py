"""The rows of one protein as bytes: a safetensors file with `structure` and `sequence`, one member of an embedding
shard.

R rows (L + 2), W width. Written by our own few lines, so that the size follows from the lengths alone and is known
before anything is encoded; read without a copy. Any safetensors library reads it.
"""

import hashlib
import json
from collections.abc import Mapping

import torch

from proteingpt.protein import ENCODER_EXTRA_ROWS, Protein

# Names of the two tensors, in the order of their bytes and of the prompt.
PARTS = ("structure", "sequence")
# Precisions of rows, and what safetensors calls them.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CODES = {code: getattr(torch, name) for name, code in DTYPES.items()}


def inputs_sha256(protein: Protein) -> str:
    """Of all that an encoder reads of a protein: letters, coordinates, confidence."""
    digest = hashlib.sha256(protein.sequence.encode())
    digest.update(protein.backbone.astype("<f4").tobytes())
    if protein.confidence is not None:
        digest.update(protein.confidence.astype("<f4").tobytes())
    return digest.hexdigest()


def header(key: str, inputs: str, num_residues: int, widths: Mapping[str, int], dtype: str) -> bytes:
    """What stands before the numbers. widths: {part: W}, 0 for a part that is not there; inputs: 64 hex digits."""
    fields: dict[str, dict] = {"__metadata__": {"key": key, "inputs": inputs}}
    num_rows, end = num_residues + ENCODER_EXTRA_ROWS, 0
    for part in PARTS:
        if widths[part]:
            start, end = end, end + num_rows * widths[part] * itemsize(dtype)
            shape = [num_rows, widths[part]]
            fields[part] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors wants the numbers on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def num_bytes(key: str, num_residues: int, widths: Mapping[str, int], dtype: str) -> int:
    """Size of the whole, from the length alone."""
    numbers = (num_residues + ENCODER_EXTRA_ROWS) * sum(widths.values()) * itemsize(dtype)
    return len(header(key, "0" * 64, num_residues, widths, dtype)) + numbers


def encode_rows(key: str, inputs: str, structure: torch.Tensor, sequence: torch.Tensor, dtype: str) -> bytes:
    """(R, W) each, on the CPU, in `dtype`; a part of width 0 is left out."""
    rows = dict(zip(PARTS, (structure, sequence), strict=True))
    widths = {part: value.shape[-1] for part, value in rows.items()}
    num_residues = max(len(value) for value in rows.values()) - ENCODER_EXTRA_ROWS
    assert all(value.dtype == getattr(torch, dtype) for part, value in rows.items() if widths[part])
    numbers = [rows[part].contiguous().view(torch.uint8).numpy().tobytes() for part in PARTS if widths[part]]
    return b"".join([header(key, inputs, num_residues, widths, dtype), *numbers])


def decode_rows(data: bytearray) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """({"key": .., "inputs": ..}, {part: (R, W)}), on the memory of `data`. ValueError where it is none of ours."""
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        fields = json.loads(bytes(data[8:begin]))
        metadata, rows = fields.pop("__metadata__"), {}
        whole = torch.frombuffer(data, dtype=torch.uint8)
        for part, field in fields.items():
            start, end = field["data_offsets"]
            rows[part] = whole[begin + start : begin + end].view(_CODES[field["dtype"]]).view(field["shape"])
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"no rows of ours: {type(error).__name__}: {error}") from error
    return metadata, rows
