"""ESM-IF1 on the backbone: reads the encoder half of the checkpoint, and hands coordinates to one of two forwards.

L residues, T rows (residues + BOS + EOS), D width.

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

from proteingpt.encoders import weights
from proteingpt.encoders.esm_if1_packed import PackedESMIF1
from proteingpt.protein import ENCODER_EXTRA_ROWS, Protein

NUM_TOKENS = 35
# Between chains, as fair-esm's `multichain_util` has it.
GAP_RESIDUES = 10
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
# One value that only carries the dtype of fair-esm's position table.
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


def inputs_of_complex(chains: Sequence[Protein]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of several chains as one, 10 residues of gap between them, BOS and EOS rows at the two ends.

    The gap is NaN with confidence -1, which is padding: it keeps its place and is not attended to (as in fair-esm).
    """
    parts = [inputs_of(chain) for chain in chains]
    end = tuple(x[:1] for x in parts[0])
    gap = np.full((GAP_RESIDUES, 3, 3), np.nan, np.float32), np.full(GAP_RESIDUES, -1, np.float32)
    pieces = [end]
    for number, (coords, confidence) in enumerate(parts):
        pieces += [gap] * (number > 0) + [(coords[1:-1], confidence[1:-1])]
    coords, confidence = (np.concatenate(arrays) for arrays in zip(*pieces, end))
    return coords, confidence


class ESMIF1Encoder(weights.FrozenEncoder):
    """Frozen encoder half of ESM-IF1. Made by `load_esm_if1`."""

    def encode(self, proteins: Sequence[Protein]) -> list[torch.Tensor]:
        """One (L + 2, width) tensor per protein, BOS and EOS rows included, in `dtype` on `device`, without gradient.

        Unresolved residues have rows too. Rows do not depend on the other proteins.
        """
        return self._rows([inputs_of(protein) for protein in proteins])

    def encode_in_complex(self, target: Protein, others: Sequence[Protein]) -> torch.Tensor:
        """(L + 2, width): rows of `target` in the presence of other chains, all in one frame of coordinates.

        The target goes first and 10 residues of gap between chains, as fair-esm does for complexes. Its BOS row is that
        of the whole, and so is its EOS row, which stands after the last chain.
        """
        (rows,) = self._rows([inputs_of_complex([target, *others])])
        return torch.cat((rows[: len(target) + 1], rows[-1:]))

    def _rows(self, inputs: list[tuple[np.ndarray, np.ndarray]]) -> list[torch.Tensor]:
        # An autocast region around the caller's model must not reach in here.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.model.rows(inputs)


def load_esm_if1(
    name_or_path: str,
    *,
    weights_dir: str | Path = "weights",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "fast",
) -> ESMIF1Encoder:
    """The encoder of ESM-IF1 from its published name or the path of a fair-esm `.pt` file, frozen, in eval mode.

    `dtype`: of the transformer layers and the rows; the GVP part stays in float32. backend: `fast`, which is ours, or
    `reference`, which is fair-esm's code. Raises WeightsNotFound, UnknownWeights or BadCheckpoint (all ValueErrors),
    and ValueError for an unknown backend.
    """
    weights.check_backend(backend)
    path = weights.find_weights(name_or_path, weights_dir)
    if path.is_dir():
        raise weights.BadCheckpoint(f"{path} is a directory: wanted the published ESM-IF1 file (.pt)")
    file = weights.WeightsFile.at(path)
    args, stored = read_esm_if1(path)
    device = torch.device(device)

    def place(name: str) -> torch.Tensor:
        in_transformer = name.startswith(("layers.", "layer_norm."))
        return stored[name].to(device, dtype if in_transformer else torch.float32, copy=True)

    if backend == "fast":
        model = PackedESMIF1.of(args, place)
    else:
        from proteingpt.encoders.reference import ReferenceESMIF1  # fair-esm is imported for this backend only

        model = ReferenceESMIF1(args, list(stored), place, dtype)
    return ESMIF1Encoder(model, args.encoder_embed_dim, (file,), device, dtype)


def read_esm_if1(path: Path) -> tuple[Namespace, dict[str, torch.Tensor]]:
    """Settings, and all tensors of the encoder by the names in fair-esm's code, names and shapes checked.

    The tensors lie on a map of the file. Raises BadCheckpoint.
    """
    checkpoint = weights.load_checkpoint(path)
    weights.check_kind(checkpoint, weights.ESM_IF1, path)
    args = weights.read_settings(checkpoint["args"], _SETTINGS, path)
    renamed = {code_name(name): value for name, value in checkpoint["model"].items() if "version" not in name}
    found = {name.removeprefix(_PREFIX): value for name, value in renamed.items() if name.startswith(_PREFIX)}
    found.pop(_DTYPE_MARKER, None)
    weights.check_weights(found, esm_if1_shapes(args), path)
    return args, found


def esm_if1_shapes(args: Namespace) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the encoder, by its name in fair-esm's code below `encoder`."""
    affine, norm, width = weights.affine_shapes, weights.norm_shapes, args.encoder_embed_dim
    shapes = {"embed_tokens.weight": (NUM_TOKENS, width), **norm("layer_norm", width)}
    shapes |= affine("embed_gvp_input_features", 15, width) | affine("embed_confidence", 16, width)
    shapes |= affine("embed_dihedrals.node_embedding", 6, width)
    shapes |= {"embed_dihedrals.norm_nodes.gain": (width,), "embed_dihedrals.norm_nodes.bias": (width,)}
    node = args.gvp_node_hidden_dim_scalar, args.gvp_node_hidden_dim_vector
    shapes |= affine("embed_gvp_output", node[0] + 3 * node[1], width) | _graph_shapes(args, node)
    layer = affine("fc1", width, args.encoder_ffn_embed_dim) | affine("fc2", args.encoder_ffn_embed_dim, width)
    layer |= norm("self_attn_layer_norm", width) | norm("final_layer_norm", width)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= affine(f"self_attn.{name}", width, width)
    for number in range(args.encoder_layers):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def _graph_shapes(args: Namespace, node: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Of the GVP encoder. `node`: scalar and vector channels of a node."""
    edge = args.gvp_edge_hidden_dim_scalar, args.gvp_edge_hidden_dim_vector
    ends = tuple(2 * of_node + of_edge for of_node, of_edge in zip(node, edge))
    wide = 4 * node[0], 2 * node[1]
    embed = "gvp_encoder.embed_graph"
    shapes = weights.affine_shapes(f"{embed}.embed_confidence", 16, node[0])
    for name, num_in, num_out in (("embed_node", (7, 3), node), ("embed_edge", (34, 1), edge)):
        shapes |= _gvp_shapes(f"{embed}.{name}.0", num_in, num_out, gated=False)
        shapes |= weights.norm_shapes(f"{embed}.{name}.1.scalar_norm", num_out[0])
    for number in range(args.gvp_num_encoder_layers):
        layer = f"gvp_encoder.encoder_layers.{number}"
        shapes |= _gvp_shapes(f"{layer}.conv.message_func.0", ends, node, gated=True)
        shapes |= _gvp_shapes(f"{layer}.conv.message_func.1", node, node, gated=True)
        shapes |= _gvp_shapes(f"{layer}.conv.message_func.2", node, node, gated=False)
        shapes |= _gvp_shapes(f"{layer}.ff_func.0", node, wide, gated=True)
        shapes |= _gvp_shapes(f"{layer}.ff_func.1", wide, node, gated=False)
        for norm in (0, 1):
            shapes |= weights.norm_shapes(f"{layer}.norm.{norm}.scalar_norm", node[0])
    return shapes


def _gvp_shapes(name: str, num_in: tuple[int, int], num_out: tuple[int, int], gated: bool) -> dict:
    """num_in, num_out: scalar and vector channels. The hidden vectors are as many as the more of the two."""
    hidden = max(num_in[1], num_out[1])
    shapes = {f"{name}.wh.weight": (hidden, num_in[1]), f"{name}.wv.weight": (num_out[1], hidden)}
    shapes |= weights.affine_shapes(f"{name}.ws", num_in[0] + hidden, num_out[0])
    return shapes | (weights.affine_shapes(f"{name}.wg", *num_out) if gated else {})
