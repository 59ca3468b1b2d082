"""What both fast encoders share: proteins laid end to end along one axis, and attention that stays within each.

N rows of all proteins in a pack, H heads, C width of a head, D width.

Every linear map sees one (N, D) matrix, so nothing is computed for padding; only attention needs to know where a
protein ends. Weights are plain tensors in tuples, not modules: no `.to(dtype)` or engine can get at them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch: one call for each protein serves there too
    varlen_attn = None

# place(name): the tensor of fair-esm's name, where and as it is to be used.
Place = Callable[[str], torch.Tensor]

# Rows in one pack, if more than one protein is in it. Enough to keep a GPU busy, few enough for a CPU's cache.
MAX_ROWS = 4096
MAX_ROWS_CPU = 1024


# torch multiplies float32 by MKL, which on processors that are not Intel's reaches half the rate of oneDNN (100 and 220
# GFLOP/s on one core of an EPYC with AVX-512). This is the way to oneDNN that torch's own compiler takes.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """x (..., in) by weight (out, in), bias (out,) and an activation, `none`, `relu` or `gelu` (the exact one)."""
    if _by_onednn(x):
        algorithm = "none" if activation == "gelu" else ""
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return _ACTIVATIONS[activation](F.linear(x, weight, bias))


def _by_onednn(x: torch.Tensor) -> bool:
    return _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


_ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu_, "gelu": F.gelu}


class Affine(NamedTuple):
    """weight (out, in), bias (out,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def of(cls, place: Place, name: str) -> "Affine":
        return cls(place(f"{name}.weight"), place(f"{name}.bias"))

    def __call__(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        return linear(x, self.weight, self.bias, activation)


class Norm(NamedTuple):
    """Layer norm over the last axis."""

    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, place: Place, name: str, weight: str = "weight") -> "Norm":
        return cls(place(f"{name}.{weight}"), place(f"{name}.bias"))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class Segments(NamedTuple):
    """Where the proteins of a pack lie.

    lengths: rows of each. offsets: int32 (proteins + 1,) first row of each, and N. positions: int64 (N,) of each row in
    its protein.
    """

    lengths: tuple[int, ...]
    offsets: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Segments":
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        starts = offsets[:-1].repeat_interleave(torch.tensor(lengths))
        positions = torch.arange(int(offsets[-1])) - starts
        return cls(tuple(lengths), offsets.to(device, torch.int32), positions.to(device))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Softmax attention of each row to all rows of its own protein, scaled by 1 / sqrt(C). (N, H, C) each, and out.

    The kernel for variable lengths exists on CUDA in half precision; elsewhere it is one dense call for each protein.
    """
    if q.is_cuda and varlen_attn is not None and q.dtype != torch.float32 and q.shape[-1] % 8 == 0:
        longest = max(segments.lengths)
        q, k, v = (x.contiguous() for x in (q, k, v))
        return varlen_attn(q, k, v, segments.offsets, segments.offsets, longest, longest)
    return attend_one_by_one(q, k, v, segments.lengths)


def attend_one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """`attend`, with a call of scaled_dot_product_attention for each protein."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), out.split(lengths), strict=True)
    for queries, keys, values, part in parts:
        # (T, H, C) -> (1, H, T, C), which is what makes the flash kernel eligible.
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (queries, keys, values))
        part.copy_(F.scaled_dot_product_attention(*heads)[0].transpose(0, 1))
    return out


class SelfAttention(NamedTuple):
    """Projections of q, k and v in one matrix (3 D, D), and the one that follows attention."""

    qkv: Affine
    out: Affine

    @classmethod
    def of(cls, place: Place, prefix: str) -> "SelfAttention":
        """From fair-esm's names below `prefix`: q_proj, k_proj, v_proj, out_proj."""
        parts = [Affine.of(place, f"{prefix}.{name}_proj") for name in "qkv"]
        return cls(Affine(*map(torch.cat, zip(*parts))), Affine.of(place, f"{prefix}.out_proj"))

    def project(self, x: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of x (N, D), each (N, H, C)."""
        if not _by_onednn(x):
            return self.qkv(x).view(len(x), 3, num_heads, -1).unbind(1)
        # oneDNN rounds half as much again as MKL; that matters in q and k only, where softmax makes it large.
        cut = 2 * x.shape[1]
        q, k = F.linear(x, self.qkv.weight[:cut], self.qkv.bias[:cut]).view(len(x), 2, num_heads, -1).unbind(1)
        return q, k, linear(x, self.qkv.weight[cut:], self.qkv.bias[cut:]).view(len(x), num_heads, -1)


class TransformerLayer(NamedTuple):
    """Layer norms before attention and before the feed-forward part, as both encoders have it."""

    attention_norm: Norm
    attention: SelfAttention
    feed_norm: Norm
    up: Affine
    down: Affine

    @classmethod
    def of(cls, place: Place, prefix: str) -> "TransformerLayer":
        """From fair-esm's names below `prefix`."""
        return cls(
            attention_norm=Norm.of(place, f"{prefix}.self_attn_layer_norm"),
            attention=SelfAttention.of(place, f"{prefix}.self_attn"),
            feed_norm=Norm.of(place, f"{prefix}.final_layer_norm"),
            up=Affine.of(place, f"{prefix}.fc1"),
            down=Affine.of(place, f"{prefix}.fc2"),
        )

    def __call__(
        self,
        x: torch.Tensor,
        num_heads: int,
        segments: Segments,
        activation: str,
        turned: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> torch.Tensor:
        """x (N, D), changed in place. turned: q and k (N, H, C) with their positions in them."""
        q, k, v = self.attention.project(self.attention_norm(x), num_heads)
        x += self.attention.out(attend(turned(q), turned(k), v, segments).flatten(1))
        x += self.down(self.up(self.feed_norm(x), activation))
        return x


def packs(lengths: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Indices of `lengths`, in their order, cut into packs of at most `max_rows` rows (or of one protein)."""
    pack: list[int] = []
    rows = 0
    for index, length in enumerate(lengths):
        if pack and rows + length > max_rows:
            yield pack
            pack, rows = [], 0
        pack.append(index)
        rows += length
    if pack:
        yield pack


def max_rows(device: torch.device) -> int:
    return MAX_ROWS_CPU if device.type == "cpu" else MAX_ROWS


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)
