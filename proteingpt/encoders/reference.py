"""The `reference` backend: fair-esm's own modules behind the same `rows` as the fast forwards.

B batch, T positions (residues + BOS + EOS, padded), D width.

Here to be compared with and to fall back on. Its batches are padded, so proteins of like length go together.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from proteingpt.encoders import fair_esm

# Padded positions in one forward. ESM-2: bounds the attention matrices, which fair-esm's code makes in full. ESM-IF1:
# each position has 30 edges, and an edge of the published model takes about 60 kB.
ESM2_MAX_POSITIONS = 4096
ESM_IF1_MAX_POSITIONS = 1024


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


class ReferenceESM2:
    """fair-esm's ESM2 without its heads. `module`: in eval mode, frozen."""

    def __init__(self, cfg: Namespace, names: Sequence[str], place: Callable[[str], torch.Tensor], layer: int):
        module = fair_esm.build_esm2(cfg)
        del module.contact_head
        module.lm_head = nn.Identity()
        for number, one in enumerate(module.layers):
            one.self_attn.rot_emb = RotaryFromFile(place(f"layers.{number}.self_attn.rot_emb.inv_freq"))
        # One tensor at a time from the file's memory map to its place: the model is never held twice.
        state = {name: place(name) for name in names if not name.endswith("inv_freq")}
        module.load_state_dict(state, strict=True, assign=True)
        self.module, self.layer = module.eval().requires_grad_(False), layer

    def rows(self, tokens: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """One (T, D) tensor for each list of T token ids."""
        rows: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
        device = self.module.embed_tokens.weight.device
        for batch in fair_esm.padded_batches([len(ids) for ids in tokens], ESM2_MAX_POSITIONS):
            ids = [torch.tensor(tokens[i]) for i in batch]
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.module.padding_idx)
            found = self.module(padded.to(device), repr_layers=[self.layer])["representations"][self.layer]
            for i, padded_rows in zip(batch, found, strict=True):
                rows[i] = padded_rows[: len(tokens[i])].clone()
        return rows


class ReferenceESMIF1:
    """fair-esm's GVPTransformerEncoder. `module`: in eval mode, frozen; `dtype`: of its transformer layers."""

    def __init__(self, args: Namespace, names: Sequence[str], place: Callable[[str], torch.Tensor], dtype: torch.dtype):
        module = fair_esm.build_esm_if1_encoder(args)
        state = {name: place(name) for name in names}
        # One value that only carries the dtype of the position table.
        state["embed_positions._float_tensor"] = torch.zeros(1, device=state["layer_norm.weight"].device)
        module.load_state_dict(state, strict=True, assign=True)
        self.module, self.dtype = module.eval().requires_grad_(False), dtype

    def rows(self, inputs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[torch.Tensor]:
        """One (T, D) tensor for each (coordinates, confidence) of T rows; rows that are padding are meaningless."""
        rows: list[torch.Tensor] = [torch.empty(0)] * len(inputs)
        for batch in fair_esm.padded_batches([len(coords) for coords, _ in inputs], ESM_IF1_MAX_POSITIONS):
            encoded = self._forward(*self._padded([inputs[i] for i in batch]))
            for column, i in enumerate(batch):
                rows[i] = encoded[: len(inputs[i][0]), column].clone()
        return rows

    def _padded(self, inputs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates (B, T, 3, 3) with NaN and confidence (B, T) with -1 where a row is padding."""
        device = self.module.layer_norm.weight.device
        coords = [torch.from_numpy(coords) for coords, _ in inputs]
        confidence = [torch.from_numpy(values) for _, values in inputs]
        padded = nn.utils.rnn.pad_sequence
        return (
            padded(coords, batch_first=True, padding_value=float("nan")).to(device),
            padded(confidence, batch_first=True, padding_value=-1.0).to(device),
        )

    def _forward(self, coords: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        """(T, B, D); rows beyond a protein's own are meaningless."""
        padding = coords[:, :, 0, 0].isnan()
        embedded, _ = self.module.forward_embedding(coords, padding, confidence)
        # As fair-esm does; attention leaves padding out besides.
        rows = embedded.masked_fill(padding.unsqueeze(-1), 0).transpose(0, 1).to(self.dtype)
        for layer in self.module.layers:
            rows = layer(rows, encoder_padding_mask=padding)
        return self.module.layer_norm(rows)
