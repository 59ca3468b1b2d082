"""ESM-IF1 on the backbone: the encoder half of fair-esm's GVP transformer.

B batch, T positions (residues + BOS + EOS, padded), L residues, D width.

Coordinates stay in the deposited frame: the features are invariant to rotation, but a missing neighbour sits at the
origin, as the published model was trained, so a shift changes rows beside gaps and ends. Everything that touches
geometry (neighbours, GVP layers, embeddings) runs in float32 with float32 weights; `dtype` is that of the transformer
layers after it. Given up: the memory and time that half precision would save in the GVP part.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from proteingpt.encoders import fair_esm, weights
from proteingpt.protein import ENCODER_EXTRA_ROWS, Protein

# Padded positions in one forward: each has 30 edges, and an edge of the published model takes about 60 kB.
MAX_POSITIONS = 1024
_PREFIX = "encoder."
_SETTINGS = {
    "encoder_embed_dim": int,
    "encoder_ffn_embed_dim": int,
    "encoder_attention_heads": int,
    "encoder_layers": int,
    "dropout": float,
    "attention_dropout": float,
    "gvp_top_k_neighbors": int,
    "gvp_node_hidden_dim_scalar": int,
    "gvp_node_hidden_dim_vector": int,
    "gvp_edge_hidden_dim_scalar": int,
    "gvp_edge_hidden_dim_vector": int,
    "gvp_num_encoder_layers": int,
    "gvp_dropout": float,
}
# Names in the published file and in fair-esm's code, as `esm/pretrained.py::update_name` pairs them, in its order.
PUBLISHED_TO_CODE = (
    ("W_v", "embed_graph.embed_node"),
    ("W_e", "embed_graph.embed_edge"),
    ("embed_scores.0", "embed_confidence"),
    ("embed_score.", "embed_graph.embed_confidence."),
    ("seq_logits_projection.", ""),
    ("embed_ingraham_features", "embed_dihedrals"),
    ("embed_gvp_in_local_frame.0", "embed_gvp_output"),
    ("embed_features_in_local_frame.0", "embed_gvp_input_features"),
)
# One value that only carries the dtype of the position table.
_DTYPE_MARKER = "embed_positions._float_tensor"


def code_name(name: str) -> str:
    """The name that a tensor of the published file has in fair-esm's code."""
    for published, code in PUBLISHED_TO_CODE:
        name = name.replace(published, code)
    return name


def inputs_of(protein: Protein) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates float32 (L + 2, 3, 3) and confidence float32 (L + 2,) as ESM-IF1 takes them.

    A residue that lacks any atom is inf in all of them, as the BOS and EOS rows are: inf is a residue that is missing
    but attended to, NaN would be padding. Confidence is 0 there, elsewhere 1 or the protein's own.
    Raises ValueError for a confidence outside 0..1, which is most often a pLDDT that was not divided by 100.
    """
    resolved = protein.resolved
    confidence = np.ones(len(protein), np.float32) if protein.confidence is None else protein.confidence
    if not ((confidence >= 0) & (confidence <= 1))[resolved].all():
        raise ValueError(
            f"protein {protein.key}: confidence runs from {confidence[resolved].min()} to "
            f"{confidence[resolved].max()}, wanted 0..1 (pLDDT / 100)"
        )
    coords = np.full((len(protein) + ENCODER_EXTRA_ROWS, 3, 3), np.inf, np.float32)
    coords[1:-1][resolved] = protein.backbone[resolved]
    row_confidence = np.zeros(len(coords), np.float32)
    row_confidence[1:-1][resolved] = confidence[resolved]
    return coords, row_confidence


class ESMIF1Encoder:
    """Frozen encoder half of ESM-IF1. `width`: columns of a row. Made by `load_esm_if1`."""

    def __init__(self, module: nn.Module, file: weights.WeightsFile, device: torch.device, dtype: torch.dtype):
        self.module = module
        self.width: int = module.embed_tokens.embedding_dim
        self.device, self.dtype = device, dtype
        self._file = file

    @property
    def fingerprint(self) -> str:
        """sha256 of the checkpoint file, in hex; computed when first asked for."""
        return self._file.sha256()

    def encode(self, proteins: Sequence[Protein]) -> list[torch.Tensor]:
        """One (L + 2, width) tensor per protein, BOS and EOS rows included, in `dtype` on `device`, without gradient.

        Unresolved residues have rows too. Rows do not depend on the other proteins.
        """
        inputs = [inputs_of(protein) for protein in proteins]
        rows: list[torch.Tensor] = [torch.empty(0)] * len(inputs)
        for batch in fair_esm.padded_batches([len(coords) for coords, _ in inputs], MAX_POSITIONS):
            encoded = self._forward(*self._padded([inputs[i] for i in batch]))
            for column, i in enumerate(batch):
                rows[i] = encoded[: len(proteins[i]) + ENCODER_EXTRA_ROWS, column].clone()
        return rows

    def _padded(self, inputs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates (B, T, 3, 3) with NaN and confidence (B, T) with -1 where a row is padding."""
        coords = [torch.from_numpy(coords) for coords, _ in inputs]
        confidence = [torch.from_numpy(values) for _, values in inputs]
        padded = nn.utils.rnn.pad_sequence
        return (
            padded(coords, batch_first=True, padding_value=float("nan")).to(self.device),
            padded(confidence, batch_first=True, padding_value=-1.0).to(self.device),
        )

    def _forward(self, coords: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        """(T, B, D); rows beyond a protein's own are meaningless."""
        padding = coords[:, :, 0, 0].isnan()
        # An autocast region around the caller's model must not reach in here.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            embedded, _ = self.module.forward_embedding(coords, padding, confidence)
            # As fair-esm does; attention leaves padding out besides.
            rows = embedded.masked_fill(padding.unsqueeze(-1), 0).transpose(0, 1).to(self.dtype)
            for layer in self.module.layers:
                rows = layer(rows, encoder_padding_mask=padding)
            return self.module.layer_norm(rows)


def load_esm_if1(
    name_or_path: str,
    *,
    weights_dir: str | Path = "weights",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ESMIF1Encoder:
    """The encoder of ESM-IF1 from its published name or the path of a fair-esm `.pt` file, frozen, in eval mode.

    `dtype`: of the transformer layers and the rows; the GVP part stays in float32. Raises WeightsNotFound,
    UnknownWeights or BadCheckpoint (all ValueErrors).
    """
    path = weights.find_weights(name_or_path, weights_dir)
    file = weights.WeightsFile.at(path)
    checkpoint = weights.load_checkpoint(path)
    weights.check_kind(checkpoint, weights.ESM_IF1, path)
    args = weights.read_settings(checkpoint["args"], _SETTINGS, path)
    device = torch.device(device)
    return ESMIF1Encoder(_module(args, checkpoint["model"], path, device, dtype), file, device, dtype)


def _module(args: Namespace, stored: dict, path: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    module = fair_esm.build_esm_if1_encoder(args)
    renamed = {code_name(name): value for name, value in stored.items() if "version" not in name}
    found = {name.removeprefix(_PREFIX): value for name, value in renamed.items() if name.startswith(_PREFIX)}
    found[_DTYPE_MARKER] = torch.zeros(1)
    weights.check_weights(found, {name: value.shape for name, value in module.state_dict().items()}, path)
    state = {
        name: value.to(device, dtype if name.startswith(("layers.", "layer_norm.")) else torch.float32, copy=True)
        for name, value in found.items()
    }
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
