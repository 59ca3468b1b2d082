"""ESM-2's forward without padding: tokens of many proteins on one axis, only the layers that are asked for.

N rows of all proteins in a pack, H heads, C width of a head, D width of a row.

The rotary frequencies are the file's and stay in float32, as do the tables made from them; q and k are rotated in
float32 and go back to the dtype of the weights. Given up: no language-model head, no contacts, no attention maps.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from proteingpt.encoders import packed
from proteingpt.encoders.packed import Norm, Place, Segments, TransformerLayer

# Trained with 15 % of the letters hidden, 80 % of those by <mask> rows that are set to zero: without any, the others
# are scaled to the same mean (fair-esm, `ESM2.forward`, token_dropout).
TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8


class Layer(NamedTuple):
    block: TransformerLayer
    inv_freq: torch.Tensor  # float32 (C / 2,)

    @classmethod
    def of(cls, place: Place, number: int, previous: torch.Tensor | None) -> "Layer":
        prefix = f"layers.{number}"
        inv_freq = place(f"{prefix}.self_attn.rot_emb.inv_freq")
        # They are the same in every published layer; one tensor for all saves making the tables again.
        shared = previous is not None and torch.equal(previous, inv_freq)
        return cls(TransformerLayer.of(place, prefix), previous if shared else inv_freq)


class PackedESM2(NamedTuple):
    """final_norm: None where an inner layer is asked for, whose rows are taken before it (as fair-esm does)."""

    num_heads: int
    scale: float
    embedding: torch.Tensor  # (letters, D)
    layers: tuple[Layer, ...]
    final_norm: Norm | None

    @classmethod
    def of(cls, cfg: Namespace, place: Place, layer: int) -> "PackedESM2":
        """place(name): the tensor of that name (fair-esm's), where and as it is to be used; asked only for `layer`."""
        layers: list[Layer] = []
        for number in range(layer):
            layers.append(Layer.of(place, number, layers[-1].inv_freq if layers else None))
        final_norm = Norm.of(place, "emb_layer_norm_after") if layer == cfg.encoder_layers else None
        scale = TOKEN_DROPOUT_SCALE if cfg.token_dropout else 1.0
        return cls(cfg.encoder_attention_heads, scale, place("embed_tokens.weight"), tuple(layers), final_norm)

    def rows(self, tokens: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """One (T, D) tensor for each list of T token ids."""
        lengths = [len(ids) for ids in tokens]
        found: list[torch.Tensor] = []
        for pack in packed.packs(lengths, packed.max_rows(self.embedding.device)):
            segments = Segments.of([lengths[i] for i in pack], self.embedding.device)
            ids = torch.tensor([token for i in pack for token in tokens[i]], device=self.embedding.device)
            # Copies: a row that is kept must not keep its pack in memory.
            found += [rows.clone() for rows in self.forward(ids, segments).split(segments.lengths)]
        return found

    def forward(self, ids: torch.Tensor, segments: Segments) -> torch.Tensor:
        """ids int64 (N,) -> (N, D)."""
        x = F.embedding(ids, self.embedding) * self.scale
        inv_freq = None
        for layer in self.layers:
            if layer.inv_freq is not inv_freq:
                inv_freq = layer.inv_freq
                cos, sin = rotary_tables(segments.positions, inv_freq)
            x = layer.block(x, self.num_heads, segments, "gelu", lambda values: rotate(values, cos, sin))
        return self.final_norm(x) if self.final_norm else x


def rotary_tables(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 (N, 1, C / 2), of position times frequency."""
    angles = torch.outer(positions.float(), inv_freq).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (N, H, C), rotated in float32, in its own dtype. Pairs are (i, i + C / 2), not neighbours."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
