"""ESM-IF1's encoder without padding; plain torch: features, message passing (esm_if1_gvp.py), transformer layers.

N rows of all proteins in a pack, E edges, S scalar and V vector channels of a node, D width of a row. Vectors are
(N, 3, V), x y z before channels. Given up: half precision before the transformer layers, where it would touch the
geometry.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from proteingpt.encoders import esm_if1_geometry as geometry
from proteingpt.encoders import packed
from proteingpt.encoders.esm_if1_gvp import GVP, Chunk, Edges, GVPLayer, NodeNorm, chunks_of
from proteingpt.encoders.packed import Affine, Norm, Place, Segments, TransformerLayer

# Edges in a chunk: an edge of the published model takes about 30 kB at the widest point.
_MAX_EDGES = 8192
_MAX_EDGES_CPU = 1024
# fair-esm's alphabet: the token of every row, and the first position, one past <pad>.
MASK_TOKEN, FIRST_POSITION = 32, 2


class PackedESMIF1(NamedTuple):
    num_neighbours: int
    num_heads: int
    separation_frequencies: torch.Tensor
    position_frequencies: torch.Tensor
    token: torch.Tensor  # (D,) what every row begins with
    embed_node: tuple[GVP, NodeNorm]
    embed_edge: tuple[GVP, NodeNorm]
    embed_confidence: Affine  # into the graph
    row_confidence: Affine  # into the rows
    row_dihedrals: Affine
    dihedral_norm: Norm
    row_features: Affine
    row_graph: Affine
    graph_layers: tuple[GVPLayer, ...]
    layers: tuple[TransformerLayer, ...]
    final_norm: Norm

    @classmethod
    def of(cls, args: Namespace, place: Place) -> "PackedESMIF1":
        """place(name): the tensor of that name (fair-esm's), where and as it is to be used."""
        token = place("embed_tokens.weight")[MASK_TOKEN] * np.sqrt(args.encoder_embed_dim)
        graph, layers = "gvp_encoder.embed_graph", "gvp_encoder.encoder_layers"
        return cls(
            num_neighbours=args.gvp_top_k_neighbors,
            num_heads=args.encoder_attention_heads,
            separation_frequencies=geometry.separation_frequencies().to(token.device),
            position_frequencies=geometry.position_frequencies(args.encoder_embed_dim).to(token.device),
            token=token,
            embed_node=(
                GVP.of(place, f"{graph}.embed_node.0", gated=False),
                NodeNorm.of(place, f"{graph}.embed_node.1"),
            ),
            embed_edge=(
                GVP.of(place, f"{graph}.embed_edge.0", gated=False),
                NodeNorm.of(place, f"{graph}.embed_edge.1"),
            ),
            embed_confidence=Affine.of(place, f"{graph}.embed_confidence"),
            row_confidence=Affine.of(place, "embed_confidence"),
            row_dihedrals=Affine.of(place, "embed_dihedrals.node_embedding"),
            dihedral_norm=Norm.of(place, "embed_dihedrals.norm_nodes", "gain"),
            row_features=Affine.of(place, "embed_gvp_input_features"),
            row_graph=Affine.of(place, "embed_gvp_output"),
            graph_layers=tuple(GVPLayer.of(place, f"{layers}.{n}", args) for n in range(args.gvp_num_encoder_layers)),
            layers=tuple(TransformerLayer.of(place, f"layers.{n}") for n in range(args.encoder_layers)),
            final_norm=Norm.of(place, "layer_norm"),
        )

    def rows(self, inputs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[torch.Tensor]:
        """One (T, D) tensor for each (coordinates, confidence) of T rows, as `inputs_of` makes them.

        Rows whose coordinates are NaN are padding, as in fair-esm: nothing attends to them, and theirs are zeros.
        """
        found: list[torch.Tensor] = []
        lengths = [len(coords) for coords, _ in inputs]
        for pack in packed.packs(lengths, packed.max_rows(self.token.device)):
            found += self._pack([inputs[i] for i in pack])
        return found

    def _pack(self, inputs: list[tuple[np.ndarray, np.ndarray]]) -> list[torch.Tensor]:
        device = self.token.device
        coords = np.concatenate([coords for coords, _ in inputs])
        lengths = [len(coords) for coords, _ in inputs]
        resolved = np.isfinite(coords).all(axis=(1, 2))
        attended = ~np.isnan(coords[:, 0, 0])
        coords = torch.from_numpy(np.where(np.isfinite(coords), coords, np.float32(0))).to(device)
        confidence = torch.from_numpy(np.concatenate([values for _, values in inputs])).to(device)
        segments = Segments.of(lengths, device)
        rows = self.embed(coords, resolved, confidence, segments).to(self.final_norm.weight.dtype)
        if attended.all():
            return [part.clone() for part in self.transform(rows, segments).split(lengths)]
        kept = torch.from_numpy(np.flatnonzero(attended)).to(device)
        shorter = Segments.of([int(part.sum()) for part in np.split(attended, np.cumsum(lengths)[:-1])], device)
        whole = torch.zeros_like(rows).index_copy_(0, kept, self.transform(rows[kept], shorter))
        return [part.clone() for part in whole.split(lengths)]

    def embed(
        self, coords: torch.Tensor, resolved: np.ndarray, confidence: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """coords (N, 3, 3) with zeros where `resolved` (N,) is false, confidence (N,) -> (N, D), all float32."""
        mask = torch.from_numpy(resolved).to(coords.device)
        levels = geometry.rbf(confidence, 1.0)
        angles, vectors = geometry.dihedrals(coords, geometry.direction), geometry.node_vectors(coords)
        s, v = self.embed_graph(angles, vectors, mask, levels)
        edges = self.edges(coords, geometry.build_graph(coords, resolved, segments, self.num_neighbours))
        for layer in self.graph_layers:
            s, v = layer(s, v, edges)
        frames = geometry.frames(coords)
        rows = self.token + self.dihedrals(coords)
        rows += self.row_graph(torch.cat((s, in_frame(v, frames)), dim=-1))
        rows += self.row_confidence(levels)
        rows += self.row_features(torch.cat((angles, in_frame(vectors, frames)), dim=-1))
        return rows.add_(self.positions(segments))

    def embed_graph(self, angles, vectors, mask, levels) -> tuple[torch.Tensor, torch.Tensor]:
        """Node scalars (N, S) and vectors (N, 3, V) that the graph layers begin with."""
        embed, normalise = self.embed_node
        s, v = normalise(*embed(torch.cat((angles, mask.float().unsqueeze(-1)), dim=-1), vectors))
        return s + self.embed_confidence(levels), v

    def edges(self, coords: torch.Tensor, graph: geometry.Graph) -> Edges:
        embed, normalise = self.embed_edge
        scalars = geometry.edge_scalars(graph, self.separation_frequencies)
        scalars, vectors = normalise(*embed(scalars, geometry.edge_vectors(graph, coords[:, 1])))
        counts = torch.from_numpy(graph.counts).to(coords.device)
        ends = [0, *np.cumsum(graph.counts).tolist()]
        chunks = []
        for first, end in chunks_of(graph.counts, _MAX_EDGES if coords.is_cuda else _MAX_EDGES_CPU):
            part = slice(ends[first], ends[end])
            if part.start < part.stop:
                ids = graph.source[part], graph.target[part]
                chunks.append(Chunk(*ids, scalars[part], vectors[part], first, counts[first:end]))
        return Edges(tuple(chunks), counts.float())

    def dihedrals(self, coords: torch.Tensor) -> torch.Tensor:
        """(N, D): angles embedded, then normalised by the sample's standard deviation (as fair-esm's Normalize)."""
        x = self.row_dihedrals(geometry.dihedrals(coords, lambda vectors: F.normalize(vectors, dim=-1)))
        deviation = (x.var(-1, keepdim=True) + 1e-6).sqrt() + 1e-6
        return self.dihedral_norm.weight * (x - x.mean(-1, keepdim=True)) / deviation + self.dihedral_norm.bias

    def positions(self, segments: Segments) -> torch.Tensor:
        """(N, D) sinusoidal table: sines, then cosines, of position times frequency."""
        angles = (segments.positions + FIRST_POSITION).float().unsqueeze(1) * self.position_frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    def transform(self, rows: torch.Tensor, segments: Segments) -> torch.Tensor:
        """The transformer layers and the final norm: (N, D) in their dtype. In place."""
        for layer in self.layers:
            rows = layer(rows, self.num_heads, segments, "relu")
        return self.final_norm(rows)


def in_frame(v: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """v (N, 3, V) in the axes of `frames` (N, 3, xyz), as (N, V * 3): the three of a channel side by side."""
    return (frames @ v).transpose(1, 2).flatten(1)
