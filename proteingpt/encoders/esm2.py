"""ESM-2 on the sequence: reads the checkpoint, makes tokens, and hands them to the fast or the reference forward.

L residues, D width.

The weights may be cast to half precision; the rotary frequencies may not (a bf16 cast of the module moves its output
by tens of percent), and they are those of the file, which were rounded to fp16 before the model was trained on.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from proteingpt.encoders import hugging_face, weights
from proteingpt.encoders.esm2_packed import PackedESM2
from proteingpt.protein import Protein

# fair-esm's alphabet "ESM-1b": four special tokens, then one letter each.
CLS, EOS, UNKNOWN = 0, 2, 3
_LETTERS = {letter: number for number, letter in enumerate("LAGVSERTIDPKQNFYMHWCXBUZO.-", 4)}
NUM_TOKENS = 33
# fair-esm takes off either (`_load_model_and_alphabet_core_v2`), so that files of any size and origin load.
_PREFIX = re.compile(r"encoder\.(sentence_encoder\.)?")
# Predict letters and contacts; they give nothing to the rows, so files with or without them serve.
_HEADS = ("lm_head.", "contact_head.")
_SETTINGS = {"encoder_layers": int, "encoder_embed_dim": int, "encoder_attention_heads": int, "token_dropout": bool}


def tokens_of(sequence: str) -> list[int]:
    """Token ids of `<cls> sequence <eos>`, one per letter, L + 2 in all.

    Letters are read as upper case; one that the alphabet does not have (J, *) is `<unk>`, never dropped or merged.
    """
    return [CLS, *(_LETTERS.get(letter.upper(), UNKNOWN) for letter in sequence), EOS]


class ESM2Encoder(weights.FrozenEncoder):
    """Frozen ESM-2. layer: whose rows they are, of num_layers. Made by `load_esm2`."""

    def __init__(self, model, cfg: Namespace, layer: int, files, device: torch.device, dtype: torch.dtype):
        super().__init__(model, cfg.encoder_embed_dim, files, device, dtype)
        self.layer, self.num_layers = layer, cfg.encoder_layers

    def encode(self, proteins: Sequence[Protein]) -> list[torch.Tensor]:
        """One (L + 2, width) tensor per protein, BOS and EOS rows included, in `dtype` on `device`, without gradient.

        Rows do not depend on the other proteins.
        """
        # An autocast region around the caller's model must not reach in here.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.model.rows([tokens_of(protein.sequence) for protein in proteins])


def load_esm2(
    name_or_path: str,
    *,
    weights_dir: str | Path = "weights",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "fast",
    layer: int | None = None,
) -> ESM2Encoder:
    """ESM-2 from a published name, a fair-esm `.pt` file or a Hugging Face directory, frozen, its weights in `dtype`.

    backend: `fast`, which is ours, or `reference`, which is fair-esm's code. layer: 0 to the number of layers, or None
    for the last, which alone is taken after the final layer norm, as fair-esm does; later layers are not loaded.
    Raises WeightsNotFound, UnknownWeights or BadCheckpoint (all ValueErrors), and ValueError for a layer or a backend
    that is not there.
    """
    weights.check_backend(backend)
    path = weights.find_weights(name_or_path, weights_dir)
    files = tuple(map(weights.WeightsFile.at, files_of(path)))
    cfg, stored = read_esm2(path)
    layer = cfg.encoder_layers if layer is None else layer
    if not 0 <= layer <= cfg.encoder_layers:
        raise ValueError(
            f"layer {layer} of {path} is asked for: it has layers 0 (the embedding) to {cfg.encoder_layers}"
        )
    device = torch.device(device)

    def place(name: str) -> torch.Tensor:
        return stored[name].to(device, torch.float32 if name.endswith("inv_freq") else dtype, copy=True)

    if backend == "fast":
        model = PackedESM2.of(cfg, place, layer)
    else:
        from proteingpt.encoders.reference import ReferenceESM2  # fair-esm is imported for this backend only

        model = ReferenceESM2(cfg, list(stored), place, layer)
    return ESM2Encoder(model, cfg, layer, files, device, dtype)


def files_of(path: Path) -> list[Path]:
    """What decides the weights: the file, or a directory's configuration and safetensors."""
    return [path / hugging_face.CONFIG, *hugging_face.weight_files(path)] if path.is_dir() else [path]


def read_esm2(path: Path) -> tuple[Namespace, dict[str, torch.Tensor]]:
    """Settings, and all tensors of the trunk by fair-esm's names, names and shapes checked; on a map of the file.

    Raises BadCheckpoint.
    """
    if path.is_dir():
        settings, found = hugging_face.read_esm2(path)
    else:
        checkpoint = weights.load_checkpoint(path)
        weights.check_kind(checkpoint, weights.ESM2, path)
        settings = checkpoint["cfg"]["model"]
        stored = checkpoint["model"].items()
        found = {_PREFIX.sub("", name, count=1): value for name, value in stored if _PREFIX.match(name)}
        found = {name: value for name, value in found.items() if not name.startswith(_HEADS)}
    cfg = weights.read_settings(settings, _SETTINGS, path)
    weights.check_weights(found, esm2_shapes(cfg), path)
    return cfg, found


def esm2_shapes(cfg: Namespace) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the trunk, by fair-esm's names below `encoder.sentence_encoder`."""
    width = cfg.encoder_embed_dim
    layer = {"self_attn.rot_emb.inv_freq": (width // cfg.encoder_attention_heads // 2,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= weights.affine_shapes(f"self_attn.{name}", width, width)
    layer |= weights.affine_shapes("fc1", width, 4 * width) | weights.affine_shapes("fc2", 4 * width, width)
    layer |= weights.norm_shapes("self_attn_layer_norm", width) | weights.norm_shapes("final_layer_norm", width)
    shapes = {"embed_tokens.weight": (NUM_TOKENS, width), **weights.norm_shapes("emb_layer_norm_after", width)}
    for number in range(cfg.encoder_layers):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes
