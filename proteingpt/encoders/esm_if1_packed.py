"""ESM-IF1's encoder without padding, with half the arithmetic on edges; plain torch.

N rows of all proteins in a pack, E edges, S scalar and V vector channels of a node, D width of a row. Vectors are
(N, 3, V), x y z before channels.

Nine tenths of the work is the message function: three GVPs (geometric vector perceptrons) on each of 30 edges for a
residue. Its first linear maps act on (source, edge, target), so the source's and the target's shares are computed once
for each residue; its last GVP is linear in all but a norm, so it acts on the mean over edges instead of on each. Edges
go by in chunks, ordered by target, and what is kept of them is a sum for each target. Exact but for rounding.
Given up: half precision before the transformer layers, where it would touch the geometry.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from proteingpt.encoders import esm_if1_geometry as geometry
from proteingpt.encoders import packed
from proteingpt.encoders.packed import Affine, Norm, SelfAttention, Segments, linear

# Edges in a chunk: an edge of the published model takes about 30 kB at the widest point.
_MAX_EDGES = 8192
_MAX_EDGES_CPU = 1024
_NODE_NORM_EPS = 1e-4
# fair-esm's alphabet: the token of every row, and the first position, one past <pad>.
MASK_TOKEN, FIRST_POSITION = 32, 2

Place = Callable[[str], torch.Tensor]


class GVP(NamedTuple):
    """A geometric vector perceptron; with a gate it has ReLU and a sigmoid gate, else it is linear but for the norm.

    hidden (H, V in), from_scalars (S out, S in), from_norms (S out, H), bias (S out,), out (V out, H).
    """

    hidden: torch.Tensor
    from_scalars: torch.Tensor
    from_norms: torch.Tensor
    bias: torch.Tensor
    out: torch.Tensor
    gate: Affine | None

    @classmethod
    def of(cls, place: Place, name: str, gated: bool) -> "GVP":
        hidden, scalars = place(f"{name}.wh.weight"), place(f"{name}.ws.weight")
        num_scalars = scalars.shape[1] - hidden.shape[0]
        gate = Affine(place(f"{name}.wg.weight"), place(f"{name}.wg.bias")) if gated else None
        bias, out = place(f"{name}.ws.bias"), place(f"{name}.wv.weight")
        from_scalars, from_norms = (part.contiguous() for part in scalars.tensor_split((num_scalars,), dim=1))
        return cls(hidden, from_scalars, from_norms, bias, out, gate)

    def __call__(self, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """s (N, S in), v (N, 3, V in) -> (N, S out), (N, 3, V out)."""
        hidden = linear(v, self.hidden)
        s = linear(s, self.from_scalars, self.bias).add_(linear(norms(hidden), self.from_norms))
        v = linear(hidden, self.out)
        return self.activate(s, v) if self.gate else (s, v)

    def activate(self, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In place: ReLU of s, and v times the gate that s opens."""
        s.relu_()
        return s, v.mul_(self.gate(s).sigmoid_().unsqueeze(1))


def norms(v: torch.Tensor) -> torch.Tensor:
    """(N, 3, V) -> (N, V): lengths as `geometry.length_of`, in one pass over each of x, y and z."""
    x, y, z = v.unbind(1)
    return x.square().addcmul_(y, y).addcmul_(z, z).add_(1e-8).sqrt_()


class NodeNorm(NamedTuple):
    """Layer norm of the scalars; the vectors are divided by the root mean square length of those that are not zero."""

    scalars: Norm

    def __call__(self, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        eps = _NODE_NORM_EPS
        squared = v.square().sum(1, keepdim=True) + eps
        some = squared > 2 * eps
        mean = (squared * some).sum(-1, keepdim=True) / (eps + some.sum(-1, keepdim=True))
        return self.scalars(s), some * (v / (mean + eps).sqrt())


class Share(NamedTuple):
    """What one of source, edge and target gives to the first GVP of a message: scalars, hidden vectors, vectors.

    The hidden vectors' norms are wanted too, so they stand beside the output vectors, which are their linear map.
    """

    scalars: torch.Tensor
    hidden: torch.Tensor
    vectors: torch.Tensor

    def __call__(self, s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return linear(s, self.scalars), linear(v, self.hidden), linear(v, self.vectors)


class Messages(NamedTuple):
    """The message function with its linear maps taken apart. third_out: the last GVP's two vector maps in one."""

    source: Share
    edge: Share
    target: Share
    first: GVP
    second: GVP
    third: GVP
    third_out: torch.Tensor

    @classmethod
    def of(cls, place: Place, name: str, num_scalars: int, num_vectors: int) -> "Messages":
        first, second = (GVP.of(place, f"{name}.{number}", gated=True) for number in (0, 1))
        third = GVP.of(place, f"{name}.2", gated=False)
        scalars = ends_and_middle(first.from_scalars, num_scalars)
        hidden = ends_and_middle(first.hidden, num_vectors)
        vectors = ends_and_middle(product(first.out, first.hidden), num_vectors)
        return cls(*map(Share, scalars, hidden, vectors), first, second, third, product(third.out, third.hidden))

    def __call__(self, s: torch.Tensor, v: torch.Tensor, edges: "Edges") -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over each node's incoming messages, (N, S) and (N, 3, V); zero where there are none."""
        shares = tuple(zip(self.source(s, v), self.target(s, v)))
        shapes = (len(self.second.bias),), (len(self.third.hidden),), (3, len(self.second.out))
        totals = [s.new_zeros(len(s), *shape) for shape in shapes]
        for chunk in edges.chunks:
            from_edge = self.edge(chunk.scalars, chunk.vectors)
            first = (gather(*ends, own, chunk) for ends, own in zip(shares, from_edge))
            for total, values in zip(totals, self.of_edges(*first), strict=True):
                add_by_target(total, values, chunk)
        scalars, lengths, vectors = totals
        counts = edges.counts.clamp(min=1).unsqueeze(1)
        return self.last(scalars / counts, lengths / counts, vectors / counts.unsqueeze(2), edges.counts > 0)

    def of_edges(self, s, hidden, v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From sums of the three shares, what the last GVP needs of each edge.

        Scalars (E, S), norms of the last GVP's hidden vectors (E, V), vectors (E, 3, V).
        """
        s += linear(norms(hidden), self.first.from_norms, self.first.bias)
        s, v = self.second(*self.first.activate(s, v))
        return s, norms(linear(v, self.third.hidden)), v

    def last(self, s, lengths, v, reached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last GVP, of means over edges. reached: bool (N,); nodes that no edge reaches get no bias either."""
        s = linear(s, self.third.from_scalars, self.third.bias) + linear(lengths, self.third.from_norms)
        return s * reached.unsqueeze(1), linear(v, self.third_out)


def ends_and_middle(weight: torch.Tensor, num_end: int) -> list[torch.Tensor]:
    """Columns that act on the source, the edge and the target, in fair-esm's order."""
    return [part.contiguous() for part in weight.tensor_split((num_end, weight.shape[1] - num_end), dim=1)]


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The two maps in one; in float64, so that it is rounded once."""
    return (left.double() @ right.double()).to(left.dtype)


class Chunk(NamedTuple):
    """Edges into a run of nodes that begins at `first`. scalars (E, S), vectors (E, 3, V). lengths: (nodes,)."""

    source: torch.Tensor
    target: torch.Tensor
    scalars: torch.Tensor
    vectors: torch.Tensor
    first: int
    lengths: torch.Tensor


class Edges(NamedTuple):
    """counts: float32 (N,) edges into each node."""

    chunks: tuple[Chunk, ...]
    counts: torch.Tensor


def chunks_of(counts: np.ndarray, max_edges: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of nodes with at most `max_edges` edges into them together, or of one node."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = ends[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + max_edges, side="right")))
        yield first, end
        first = end


def gather(source: torch.Tensor, target: torch.Tensor, own: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Each edge's own values (E, ...), with those of its two ends added, in place."""
    return own.add_(source.index_select(0, chunk.source)).add_(target.index_select(0, chunk.target))


def add_by_target(total: torch.Tensor, values: torch.Tensor, chunk: Chunk) -> None:
    """Adds each edge's values to its target's row of `total`. In a fixed order, so that the same gives the same."""
    part = total[chunk.first : chunk.first + len(chunk.lengths)]
    if values.is_cuda:  # index_add_ is atomic there
        part.copy_(sum_segments(values, chunk.lengths))
    else:
        part.index_add_(0, chunk.target - chunk.first, values)


def sum_segments(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive runs of `values` (E, ...): (runs, ...)."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)


class GVPLayer(NamedTuple):
    messages: Messages
    feed: tuple[GVP, GVP]
    norms: tuple[NodeNorm, NodeNorm]

    def __call__(self, s: torch.Tensor, v: torch.Tensor, edges: Edges) -> tuple[torch.Tensor, torch.Tensor]:
        more_s, more_v = self.messages(s, v, edges)
        s, v = self.norms[0](s + more_s, v + more_v)
        more_s, more_v = self.feed[1](*self.feed[0](s, v))
        return self.norms[1](s + more_s, v + more_v)


class TransformerLayer(NamedTuple):
    attention_norm: Norm
    attention: SelfAttention
    feed_norm: Norm
    up: Affine
    down: Affine

    def __call__(self, x: torch.Tensor, num_heads: int, segments: Segments) -> torch.Tensor:
        q, k, v = self.attention.project(self.attention_norm(x), num_heads)
        x = x + self.attention.out(packed.attend(q, k, v, segments).flatten(1))
        return x + self.down(self.up(self.feed_norm(x), "relu"))


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
        affine = lambda name: Affine(place(f"{name}.weight"), place(f"{name}.bias"))  # noqa: E731
        token = place("embed_tokens.weight")[MASK_TOKEN] * np.sqrt(args.encoder_embed_dim)
        graph = "gvp_encoder.embed_graph"
        return cls(
            num_neighbours=args.gvp_top_k_neighbors,
            num_heads=args.encoder_attention_heads,
            separation_frequencies=geometry.separation_frequencies().to(token.device),
            position_frequencies=geometry.position_frequencies(args.encoder_embed_dim).to(token.device),
            token=token,
            embed_node=_embedding(place, f"{graph}.embed_node"),
            embed_edge=_embedding(place, f"{graph}.embed_edge"),
            embed_confidence=affine(f"{graph}.embed_confidence"),
            row_confidence=affine("embed_confidence"),
            row_dihedrals=affine("embed_dihedrals.node_embedding"),
            dihedral_norm=Norm(*(place(f"embed_dihedrals.norm_nodes.{part}") for part in ("gain", "bias"))),
            row_features=affine("embed_gvp_input_features"),
            row_graph=affine("embed_gvp_output"),
            graph_layers=tuple(_graph_layer(args, place, number) for number in range(args.gvp_num_encoder_layers)),
            layers=tuple(_transformer_layer(place, number) for number in range(args.encoder_layers)),
            final_norm=Norm(*(place(f"layer_norm.{part}") for part in ("weight", "bias"))),
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
        """The transformer layers and the final norm: (N, D) in their dtype."""
        for layer in self.layers:
            rows = layer(rows, self.num_heads, segments)
        return self.final_norm(rows)


def in_frame(v: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """v (N, 3, V) in the axes of `frames` (N, 3, xyz), as (N, V * 3): the three of a channel side by side."""
    return (frames @ v).transpose(1, 2).flatten(1)


def _embedding(place: Place, name: str) -> tuple[GVP, NodeNorm]:
    return GVP.of(place, f"{name}.0", gated=False), _node_norm(place, f"{name}.1")


def _node_norm(place: Place, name: str) -> NodeNorm:
    return NodeNorm(Norm(*(place(f"{name}.scalar_norm.{part}") for part in ("weight", "bias"))))


def _graph_layer(args: Namespace, place: Place, number: int) -> GVPLayer:
    name = f"gvp_encoder.encoder_layers.{number}"
    dims = args.gvp_node_hidden_dim_scalar, args.gvp_node_hidden_dim_vector
    return GVPLayer(
        messages=Messages.of(place, f"{name}.conv.message_func", *dims),
        feed=(GVP.of(place, f"{name}.ff_func.0", gated=True), GVP.of(place, f"{name}.ff_func.1", gated=False)),
        norms=(_node_norm(place, f"{name}.norm.0"), _node_norm(place, f"{name}.norm.1")),
    )


def _transformer_layer(place: Place, number: int) -> TransformerLayer:
    prefix = f"layers.{number}"
    names = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    names += ["fc1", "fc2", "self_attn_layer_norm", "final_layer_norm"]
    tensors = {f"{name}.{part}": place(f"{prefix}.{name}.{part}") for name in names for part in ("weight", "bias")}
    return TransformerLayer(
        attention_norm=packed.norm(tensors, "self_attn_layer_norm"),
        attention=SelfAttention.of(tensors, "self_attn"),
        feed_norm=packed.norm(tensors, "final_layer_norm"),
        up=packed.affine(tensors, "fc1"),
        down=packed.affine(tensors, "fc2"),
    )
