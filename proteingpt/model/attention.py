"""Shared-prefix attention: the questions about a protein read its prefix once.

Legend: B = 1 row, H query heads, T tokens, D head width. Registered with transformers, so any causal LM whose layers
go through its attention interface gets it. Two ways to the same values: FlexAttention over the whole row (flex.py), for
GPUs; and SDPA group by group, the reference, exact anywhere, in which T never squares.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from proteingpt.model import flex

NAME = "shared_prefix"


class AttentionError(ValueError):
    """The LLM asks for an attention that is not computed here: ignored, it would learn in another model."""


# What some LLMs add to attention (Gemma-2's cap on scores, gpt-oss's sinks, relative positions): not computed here.
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias")


# Tokens of a group beyond which its prefix and each branch are read apart instead of under one dense mask. On a CPU the
# dense mask computes what it then hides; below, calls cost more than that (benchmarks/shared_prefix.py). Elsewhere
# calls cost more, and this bounds the mask: 16 M entries, where a row of 16k tokens would make 256 M.
DENSE_TOKENS = {"cpu": 384}
DENSE_TOKENS_ELSEWHERE = 4096


@dataclass(frozen=True)
class Part:
    """Queries [begin, end) that see the keys of `spans`, one after the other. mask: bool (queries, keys), None for
    causal."""

    begin: int
    end: int
    spans: tuple[tuple[int, int], ...]
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Layout:
    """Who sees whom, made once for a pack: a block mask for FlexAttention, or parts that cover the row in order.

    group_starts, branch_ids: as in a Pack.
    """

    group_starts: list[int]
    branch_ids: torch.Tensor
    block_mask: BlockMask | None
    parts: list[Part]

    @cached_property
    def longest_sample(self) -> int:
        """Tokens of a prefix with its longest branch. Waits for the device."""
        groups = zip(self.group_starts, self.group_starts[1:])
        counts = [self.branch_ids[begin:end].bincount() for begin, end in groups]
        return max(int(count[0]) + (int(count[1:].max()) if len(count) > 1 else 0) for count in counts)


def choose(wanted: str, device: torch.device) -> str:
    """model.attention (auto, flex or sdpa) -> flex or sdpa: FlexAttention where it has a compiled kernel."""
    return wanted if wanted != "auto" else "flex" if device.type == "cuda" else "sdpa"


def group_mask(branch_ids: torch.Tensor) -> torch.Tensor:
    """bool (n, n) for one group: token i sees j <= i if j is on the shared prefix (0) or on i's own branch."""
    query, key = branch_ids[:, None], branch_ids[None, :]
    causal = torch.ones(len(branch_ids), len(branch_ids), dtype=torch.bool, device=branch_ids.device).tril()
    return causal & ((key == 0) | (key == query))


def make_layout(
    group_starts: list[int], branch_ids: torch.Tensor, way: str = "sdpa", dense_tokens: int | None = None
) -> Layout:
    """group_starts, branch_ids: as in a Pack. way: flex, for a row of flex.padded_length, or sdpa. dense_tokens: of a
    group that has one mask; None: what suits the device."""
    if way == "flex":
        return Layout(group_starts, branch_ids, flex.make_block_mask(group_starts, branch_ids), [])
    limit = DENSE_TOKENS.get(branch_ids.device.type, DENSE_TOKENS_ELSEWHERE) if dense_tokens is None else dense_tokens
    parts = []
    for begin, end in zip(group_starts, group_starts[1:]):
        if end - begin <= limit:
            parts.append(Part(begin, end, ((begin, end),), group_mask(branch_ids[begin:end])))
        else:
            parts += split_group(begin, branch_ids[begin:end])
    return Layout(group_starts, branch_ids, None, parts)


def split_group(begin: int, branch_ids: torch.Tensor) -> list[Part]:
    """The prefix, causal, and then each branch, which sees the whole prefix and itself."""
    _, lengths = torch.unique_consecutive(branch_ids, return_counts=True)
    prefix, *branches = lengths.tolist()
    parts = [Part(begin, begin + prefix, ((begin, begin + prefix),), None)]
    first = begin + prefix
    for length in branches:
        mask = torch.ones(length, prefix + length, dtype=torch.bool, device=branch_ids.device).tril(diagonal=prefix)
        parts.append(Part(first, first + length, ((begin, begin + prefix), (first, first + length)), mask))
        first += length
    return parts


def shared_prefix_attention(module, query, key, value, attention_mask=None, scaling=None, layout=None, **extra):
    """transformers' attention function. query: (1, H, T, D); key, value: (1, H or fewer, T, D) -> (1, T, H, D).

    AttentionError where the LLM asks for an attention that this is not.
    """
    name = type(module).__name__
    assert layout is not None, f"{name} does not hand its keyword arguments on to its attention function"
    check_supported(name, extra, layout)
    if layout.block_mask is not None:
        return flex.attend(query, key, value, layout.block_mask, scaling).transpose(1, 2), None
    grouped_query = key.shape[1] != query.shape[1]
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, part.begin : part.end],
            joined(key, part.spans),
            joined(value, part.spans),
            attn_mask=part.mask,
            is_causal=part.mask is None,
            scale=scaling,
            enable_gqa=grouped_query,
        )
        for part in layout.parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def check_supported(name: str, extra: dict, layout: Layout):
    """AttentionError naming what the layer `name` asks for beyond what is computed here."""
    unsupported = [key for key in UNSUPPORTED if extra.get(key) is not None]
    if unsupported:
        raise AttentionError(
            f"{name} asks for {', '.join(unsupported)}, which shared-prefix attention does not compute: choose an LLM "
            "without, such as Llama, Mistral or Qwen"
        )
    window = extra.get("sliding_window")
    # A sample within the window sees all of itself either way. Most packs show that without a look at the samples.
    longest_group = max(end - begin for begin, end in zip(layout.group_starts, layout.group_starts[1:]))
    if window is not None and longest_group > window and layout.longest_sample > window:
        raise AttentionError(
            f"{name} has a sliding window of {window} tokens and was given a sample of {layout.longest_sample}: what "
            "it would not see is not hidden here; leave longer samples out (data.max_residues), or choose an LLM "
            "without"
        )


def check_positions(config):
    """AttentionError where rotary positions depend on the longest sample in the row, so that samples would feel each
    other: longrope changes them all once one of them is longer than the original context."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    if any(part.get("rope_type") == "longrope" for part in kinds):
        raise AttentionError(
            f"{type(config).__name__} has longrope positions, which change for all samples of a pack with the longest "
            "of them: choose an LLM without, such as Llama, Mistral or Qwen, or a variant with the short context"
        )


def joined(tensor: torch.Tensor, spans) -> torch.Tensor:
    """Positions of `spans` along the tokens of (1, H, T, D)."""
    parts = [tensor[:, :, begin:end] for begin, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


AttentionInterface.register(NAME, shared_prefix_attention)
