"""The message passing of ESM-IF1 with half the arithmetic on edges: GVPs (geometric vector perceptrons) on a graph.

N rows of all proteins in a pack, E edges, S scalar and V vector channels of a node. Vectors are (N, 3, V), x y z before
channels.

Nine tenths of ESM-IF1's work is the message function: three GVPs on each of 30 edges for a residue. Its first linear
maps act on (source, edge, target), so the source's and the target's shares are computed once for each residue; its last
GVP is linear in all but a norm, so it acts on the mean over edges instead of on each. Edges go by in chunks, ordered by
target, and what is kept of them is a sum for each target. Exact but for rounding.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from proteingpt.encoders.packed import Affine, Norm, Place, linear

_NODE_NORM_EPS = 1e-4


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
        gate = Affine.of(place, f"{name}.wg") if gated else None
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

    @classmethod
    def of(cls, place: Place, name: str) -> "NodeNorm":
        return cls(Norm.of(place, f"{name}.scalar_norm"))

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

    @classmethod
    def of(cls, place: Place, name: str, args: Namespace) -> "GVPLayer":
        dims = args.gvp_node_hidden_dim_scalar, args.gvp_node_hidden_dim_vector
        messages = Messages.of(place, f"{name}.conv.message_func", *dims)
        feed = GVP.of(place, f"{name}.ff_func.0", gated=True), GVP.of(place, f"{name}.ff_func.1", gated=False)
        return cls(messages, feed, (NodeNorm.of(place, f"{name}.norm.0"), NodeNorm.of(place, f"{name}.norm.1")))

    def __call__(self, s: torch.Tensor, v: torch.Tensor, edges: Edges) -> tuple[torch.Tensor, torch.Tensor]:
        more_s, more_v = self.messages(s, v, edges)
        s, v = self.norms[0](s + more_s, v + more_v)
        more_s, more_v = self.feed[1](*self.feed[0](s, v))
        return self.norms[1](s + more_s, v + more_v)
