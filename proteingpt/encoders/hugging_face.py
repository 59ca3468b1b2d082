"""ESM-2 in a Hugging Face directory (`config.json` and safetensors), under the names that fair-esm's file has.

The rotary frequencies are read, not recomputed: the model was trained with those of the file. Older directories hold
them once for each layer, newer ones once for the model. Given up: PyTorch pickles (`pytorch_model.bin`).
"""

import json
import re
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from proteingpt.encoders.weights import BadCheckpoint

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FIELDS = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_attention_heads": "num_attention_heads",
    "token_dropout": "token_dropout",
}
# What the forward takes for granted, and what transformers assumes where it is not said.
_WANTED = {"position_embedding_type": "rotary", "emb_layer_norm_before": False, "layer_norm_eps": 1e-5}
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
# Parts of a layer's name, here and in fair-esm.
_PARTS = (
    ("attention.self.query", "self_attn.q_proj"),
    ("attention.self.key", "self_attn.k_proj"),
    ("attention.self.value", "self_attn.v_proj"),
    ("attention.self.rotary_embeddings.inv_freq", "self_attn.rot_emb.inv_freq"),
    ("attention.output.dense", "self_attn.out_proj"),
    ("attention.LayerNorm", "self_attn_layer_norm"),
    ("intermediate.dense", "fc1"),
    ("output.dense", "fc2"),
    ("LayerNorm", "final_layer_norm"),
)
_WHOLE = {
    "embeddings.word_embeddings.weight": "embed_tokens.weight",
    "encoder.emb_layer_norm_after.weight": "emb_layer_norm_after.weight",
    "encoder.emb_layer_norm_after.bias": "emb_layer_norm_after.bias",
}
# One tensor for all layers: in the module of newer transformers, and as they write it to a file, star and all.
_SHARED_FREQUENCIES = ("rotary_embeddings.inv_freq", "encoder.layer.*.attention.self.rotary_embeddings.inv_freq")
# Names that transformers goes back to when it saves the weight and bias of a layer norm.
_OLD_ENDINGS = {"gamma": "weight", "beta": "bias"}
# Positions are rotary, so these are unused leftovers; heads and pooler give nothing to the rows.
_UNUSED = ("embeddings.position_", "lm_head.", "contact_head.", "pooler.")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the directory, in order. Raises BadCheckpoint where there are none."""
    if (directory / _INDEX).is_file():
        names = sorted(set(_json(directory / _INDEX).get("weight_map", {}).values()))
    else:
        names = [_SINGLE]
    files = [directory / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise BadCheckpoint(
            f"{directory} has no {missing[0] if missing else _SINGLE}: wanted a Hugging Face ESM-2 with safetensors"
        )
    return files


def read_esm2(directory: Path) -> tuple[Namespace, dict[str, torch.Tensor]]:
    """(settings by fair-esm's names, tensors by fair-esm's names, on the CPU). Raises BadCheckpoint."""
    cfg = _settings(directory)
    stored: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        try:
            stored.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{file} cannot be read as safetensors: download it again ({error})") from error
    tensors: dict[str, torch.Tensor] = {}
    # A configuration without a number of layers is refused by the caller, who checks all settings.
    num_layers = cfg.encoder_layers if isinstance(cfg.encoder_layers, int) else 0
    for name, value in stored.items():
        short = name.removeprefix("esm.")
        if short in _SHARED_FREQUENCIES:
            per_layer = (f"layers.{number}.self_attn.rot_emb.inv_freq" for number in range(num_layers))
            tensors.update(dict.fromkeys(per_layer, value))
        elif not short.startswith(_UNUSED):
            tensors[fair_esm_name(short)] = value
    return cfg, tensors


def fair_esm_name(name: str) -> str:
    """fair-esm's name for a tensor of `EsmModel`; one that it does not have is given back as it is."""
    stem, _, ending = name.rpartition(".")
    name = f"{stem}.{_OLD_ENDINGS.get(ending, ending)}"
    found = _LAYER.fullmatch(name)
    if not found:
        return _WHOLE.get(name, name)
    number, rest = found.groups()
    for part, code in _PARTS:
        if rest.startswith(part):
            return f"layers.{number}.{code}{rest.removeprefix(part)}"
    return name


def _settings(directory: Path) -> Namespace:
    config = _json(directory / CONFIG)
    if config.get("model_type") != "esm" or config.get("is_folding_model"):
        kind = config.get("model_type")
        raise BadCheckpoint(f"{directory / CONFIG} is of model type {kind!r}: wanted an ESM-2 (esm)")
    for field, wanted in _WANTED.items():
        if config.get(field) != wanted:
            raise BadCheckpoint(f"{directory / CONFIG}: {field} is {config.get(field)!r}, an ESM-2 has {wanted!r}")
    return Namespace(**{ours: config.get(theirs) for ours, theirs in _FIELDS.items()})


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{path} holds a {type(values).__name__}, wanted an object")
    return values
