"""Tiny random ESM-2 and ESM-IF1 checkpoints in fair-esm's own file formats, for the demo and the tests.

Random, but of use: residue identity can be read linearly from the ESM-2 rows and local backbone geometry from the
ESM-IF1 rows, so a projection trained on top of them can learn. Attention is sharp and biases are not zero, so that an
error in position or scale shows in the output, which a fresh initialisation would hide.
"""

import io
import math
import os
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from proteingpt.encoders import fair_esm
from proteingpt.encoders.esm_if1 import PUBLISHED_TO_CODE

# Sharpens attention from nearly uniform to a few positions per head.
_QUERY_KEY_SCALE = 3.0
# Keeps what a layer adds small beside what it is added to, so that the input stays readable in the output.
_RESIDUAL_SCALE = 0.3


def write_tiny_esm2(
    path: str | Path, *, num_layers: int = 2, width: int = 64, num_heads: int = 4, seed: int = 0
) -> Path:
    """Writes an ESM-2 of random weights as fair-esm's file has it: fp16, each layer's rotary frequencies, LM head.

    The same arguments give the same bytes. `width` is a multiple of 2 * `num_heads`.
    """
    if width % (2 * num_heads):
        raise ValueError(f"width {width} is not a multiple of 2 * num_heads ({2 * num_heads})")
    cfg = Namespace(
        arch="esm2_tiny",
        encoder_layers=num_layers,
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=4 * width,
        encoder_attention_heads=num_heads,
        token_dropout=True,
    )
    module = fair_esm.build_esm2(cfg)
    tensors = {
        name: _esm2_tensor(name, tuple(value.shape), seed).half()
        for name, value in module.state_dict().items()
        if not name.startswith("contact_head.")
    }
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    return _save({"cfg": {"model": cfg}, "model": _renamed(tensors, _esm2_file_name)}, path)


def _esm2_file_name(name: str) -> str:
    return f"encoder.{name}" if name.startswith("lm_head.") else f"encoder.sentence_encoder.{name}"


def _esm2_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if name.endswith("inv_freq"):
        (half_width,) = shape
        return 10000.0 ** (-torch.arange(half_width) / half_width)
    if name == "embed_tokens.weight":
        weight = _normal(name, shape, seed)
        weight[fair_esm.alphabet(fair_esm.ESM2_ALPHABET).padding_idx] = 0
        return weight
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return _QUERY_KEY_SCALE * _linear(name, shape, seed)
    return _common_tensor(name, shape, seed)


def write_tiny_esm_if1(
    path: str | Path,
    *,
    num_layers: int = 2,
    width: int = 64,
    num_heads: int = 4,
    num_gvp_layers: int = 1,
    node_dims: tuple[int, int] = (32, 8),
    edge_dims: tuple[int, int] = (16, 1),
    num_neighbors: int = 12,
    seed: int = 0,
) -> Path:
    """Writes an ESM-IF1 of random weights as the published file has it: encoder and decoder, with its tensor names.

    node_dims, edge_dims: scalar and vector features in the GVP layers. The same arguments give the same bytes.
    """
    if width % num_heads or width % 2:
        raise ValueError(f"width {width} is not an even multiple of num_heads ({num_heads})")
    args = Namespace(
        arch=fair_esm.ESM_IF1_ALPHABET,
        dropout=0.1,
        attention_dropout=0.1,
        gvp_top_k_neighbors=num_neighbors,
        gvp_node_hidden_dim_scalar=node_dims[0],
        gvp_node_hidden_dim_vector=node_dims[1],
        gvp_edge_hidden_dim_scalar=edge_dims[0],
        gvp_edge_hidden_dim_vector=edge_dims[1],
        gvp_num_encoder_layers=num_gvp_layers,
        gvp_dropout=0.1,
        **_transformer_args("encoder", num_layers, width, num_heads),
        **_transformer_args("decoder", 1, width, num_heads),
    )
    shapes = {name: tuple(value.shape) for name, value in fair_esm.build_esm_if1(args).state_dict().items()}
    tensors = {name: _esm_if1_tensor(name, shape, seed) for name, shape in shapes.items()}
    # The published code kept a version number among the weights; fair-esm skips it.
    tensors["decoder.version"] = torch.tensor([3.0])
    return _save({"args": args, "model": _renamed(tensors, _published_name)}, path)


def _transformer_args(part: str, num_layers: int, width: int, num_heads: int) -> dict[str, int]:
    return {
        f"{part}_layers": num_layers,
        f"{part}_embed_dim": width,
        f"{part}_ffn_embed_dim": 2 * width,
        f"{part}_attention_heads": num_heads,
    }


def _published_name(name: str) -> str:
    """A tensor's name in the published file: the inverse of `esm/pretrained.py::update_name`.

    Longer names first: `embed_confidence` is part of `embed_graph.embed_confidence`.
    """
    for published, code in sorted(PUBLISHED_TO_CODE, key=lambda pair: -len(pair[1])):
        if code:
            name = name.replace(code, published)
    return name


def _esm_if1_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if name.endswith("_float_tensor"):
        return torch.zeros(shape)
    if name.endswith("embed_tokens.weight"):
        # fair-esm multiplies by the square root of the width.
        return _normal(name, shape, seed) / math.sqrt(shape[1])
    return _common_tensor(name, shape, seed)


def _common_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if "norm" in name.split(".")[-2] and name.endswith((".weight", ".gain")):
        return 1 + 0.1 * _normal(name, shape, seed)
    if len(shape) == 1:
        return 0.1 * _normal(name, shape, seed)
    scale = _RESIDUAL_SCALE if name.endswith(("out_proj.weight", "fc2.weight")) else 1.0
    return scale * _linear(name, shape, seed)


def _linear(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Keeps the variance of its input: standard deviation 1 / sqrt(fan-in)."""
    return _normal(name, shape, seed) / math.sqrt(shape[-1])


def _normal(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    # Each tensor has its own stream, so that one more tensor changes no other.
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _renamed(tensors: dict[str, torch.Tensor], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    renamed = {rename(name): value for name, value in tensors.items()}
    assert len(renamed) == len(tensors)
    return renamed


def _save(checkpoint: dict, path: str | Path) -> Path:
    """Written beside and renamed, so that no reader meets half a file; through memory, so that no path is in it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_bytes(buffer.getbuffer())
    os.replace(partial, path)
    return path
