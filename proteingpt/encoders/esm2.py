"""ESM-2 on the sequence: fair-esm's module, with the rotary tables kept in float32.

B batch, T positions (residues + BOS + EOS, padded), L residues, D width.

The weights may be cast to half precision; the rotary frequencies may not (a bf16 cast of the module moves its output
by tens of percent), and they are those of the file, which were rounded to fp16 before the model was trained on.
Given up: fair-esm's forward pads its batches; proteins of like length are batched together to keep that small.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from proteingpt.encoders import fair_esm, weights
from proteingpt.protein import ENCODER_EXTRA_ROWS, Protein

# Padded positions in one forward: bounds the attention matrices, which fair-esm's code makes in full.
MAX_POSITIONS = 4096
_PREFIX = "encoder.sentence_encoder."
# Predict letters and contacts; they give nothing to the rows, so files with or without them serve.
_HEADS = ("lm_head.", "contact_head.")
_SETTINGS = {"encoder_layers": int, "encoder_embed_dim": int, "encoder_attention_heads": int, "token_dropout": bool}


class RotaryFromFile(nn.Module):
    """Rotary position embedding with given frequencies, in float32 whatever the dtype of the weights.

    `inv_freq`, float32 (head width / 2,), is neither parameter nor buffer, so no `.to(dtype)` reaches it.
    """

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__()
        self.inv_freq = inv_freq.float()

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k: (B * heads, T, head width), rotated by their position and returned in their own dtype."""
        positions = torch.arange(k.shape[-2], device=k.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq).repeat(1, 2)
        return _rotate(q, angles.cos(), angles.sin()), _rotate(k, angles.cos(), angles.sin())


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # Pairs are (i, i + half), as in GPT-NeoX, not neighbours.
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def tokens_of(sequence: str) -> list[int]:
    """Token ids of `<cls> sequence <eos>`, one per letter, L + 2 in all.

    Letters are read as upper case; one that the alphabet does not have (J, *) is `<unk>`, never dropped or merged.
    """
    letters = fair_esm.alphabet(fair_esm.ESM2_ALPHABET)
    return [letters.cls_idx, *(letters.get_idx(letter.upper()) for letter in sequence), letters.eos_idx]


class ESM2Encoder:
    """Frozen ESM-2. `width`: columns of a row. Made by `load_esm2`."""

    def __init__(self, module: nn.Module, file: weights.WeightsFile, device: torch.device, dtype: torch.dtype):
        self.module = module
        self.width: int = module.embed_dim
        self.device, self.dtype = device, dtype
        self._file = file

    @property
    def fingerprint(self) -> str:
        """sha256 of the checkpoint file, in hex; computed when first asked for."""
        return self._file.sha256()

    def encode(self, proteins: Sequence[Protein]) -> list[torch.Tensor]:
        """One (L + 2, width) tensor per protein, BOS and EOS rows included, in `dtype` on `device`, without gradient.

        Rows are the last layer's after the final layer norm, and do not depend on the other proteins.
        """
        tokens = [torch.tensor(tokens_of(protein.sequence)) for protein in proteins]
        rows: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
        for batch in fair_esm.padded_batches([len(ids) for ids in tokens], MAX_POSITIONS):
            encoded = self._forward([tokens[i] for i in batch])
            for i, padded_rows in zip(batch, encoded, strict=True):
                rows[i] = padded_rows[: len(proteins[i]) + ENCODER_EXTRA_ROWS].clone()
        return rows

    def _forward(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        """(B, T, D); rows beyond a protein's own are meaningless."""
        last, padding = self.module.num_layers, self.module.padding_idx
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding).to(self.device)
        # An autocast region around the caller's model must not reach in here.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.module(padded, repr_layers=[last])["representations"][last]


def load_esm2(
    name_or_path: str,
    *,
    weights_dir: str | Path = "weights",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ESM2Encoder:
    """ESM-2 from a published name or the path of a fair-esm `.pt` file, frozen, in eval mode, its weights in `dtype`.

    Raises WeightsNotFound, UnknownWeights or BadCheckpoint (all ValueErrors).
    """
    path = weights.find_weights(name_or_path, weights_dir)
    file = weights.WeightsFile.at(path)
    checkpoint = weights.load_checkpoint(path)
    weights.check_kind(checkpoint, weights.ESM2, path)
    cfg = weights.read_settings(checkpoint["cfg"]["model"], _SETTINGS, path)
    device = torch.device(device)
    return ESM2Encoder(_module(cfg, checkpoint["model"], path, device, dtype), file, device, dtype)


def _module(cfg: Namespace, stored: dict, path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    module = fair_esm.build_esm2(cfg)
    del module.contact_head
    module.lm_head = nn.Identity()
    found = {name.removeprefix(_PREFIX): value for name, value in stored.items() if name.startswith(_PREFIX)}
    found = {name: value for name, value in found.items() if not name.startswith(_HEADS)}
    weights.check_weights(found, {name: value.shape for name, value in module.state_dict().items()}, path)
    for number, layer in enumerate(module.layers):
        inv_freq = found.pop(f"layers.{number}.self_attn.rot_emb.inv_freq")
        layer.self_attn.rot_emb = RotaryFromFile(inv_freq.to(device, torch.float32, copy=True))
    # One tensor at a time from the file's memory map to its place: the model is never held twice.
    state = {name: value.to(device, dtype, copy=True) for name, value in found.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
