"""Shared-prefix attention: the questions about a protein read its prefix once.

Legend: B = 1 row, H query heads, T tokens, D head width. Registered with transformers, so any causal LM whose layers
go through its attention interface gets it. Each group is attended to on its own: exact, and T never squares.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "shared_prefix"

# What some LLMs add to attention (Gemma-2's cap on scores, gpt-oss's sinks, relative positions): not computed here.
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias")


# Tokens of a group beyond which reading its prefix and each branch by itself beats one dense mask on a CPU, where the
# dense mask computes what it then hides. Below, calls cost more than that. (benchmarks/shared_prefix.py)
DENSE_TOKENS = 384


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
    """Who sees whom: parts that cover the row in order."""

    parts: list[Part]


def group_mask(branch_ids: torch.Tensor) -> torch.Tensor:
    """bool (n, n) for one group: token i sees j <= i if j is on the shared prefix (0) or on i's own branch."""
    query, key = branch_ids[:, None], branch_ids[None, :]
    causal = torch.ones(len(branch_ids), len(branch_ids), dtype=torch.bool, device=branch_ids.device).tril()
    return causal & ((key == 0) | (key == query))


def make_layout(group_starts: list[int], branch_ids: torch.Tensor, dense_tokens: int = DENSE_TOKENS) -> Layout:
    """group_starts, branch_ids: as in a Pack. On a GPU every group has a dense mask: its kernels are few and large."""
    parts = []
    for begin, end in zip(group_starts, group_starts[1:]):
        if branch_ids.device.type != "cpu" or end - begin <= dense_tokens:
            parts.append(Part(begin, end, ((begin, end),), group_mask(branch_ids[begin:end])))
        else:
            parts += split_group(begin, branch_ids[begin:end])
    return Layout(parts)


def split_group(begin: int, branch_ids: torch.Tensor) -> list[Part]:
    """The prefix, causal, and then each branch, which sees the whole prefix and itself."""
    _, lengths = torch.unique_consecutive(branch_ids, return_counts=True)
    prefix, *branches = lengths.tolist()
    parts = [Part(begin, begin + prefix, ((begin, begin + prefix),), None)]
    first = begin + prefix
    for length in branches:
        mask = torch.ones(length, prefix + length, dtype=torch.bool).tril(diagonal=prefix)
        parts.append(Part(first, first + length, ((begin, begin + prefix), (first, first + length)), mask))
        first += length
    return parts


def shared_prefix_attention(module, query, key, value, attention_mask=None, scaling=None, layout=None, **extra):
    """transformers' attention function. query: (1, H, T, D); key, value: (1, H or fewer, T, D) -> (1, T, H, D).

    ValueError where the LLM asks for an attention that this is not: ignored, it would learn in another model.
    """
    name = type(module).__name__
    assert layout is not None, f"{name} does not hand its keyword arguments on to its attention function"
    unsupported = [key for key in UNSUPPORTED if extra.get(key) is not None]
    if unsupported:
        raise ValueError(
            f"{name} asks for {', '.join(unsupported)}, which shared-prefix attention does not compute: choose an LLM "
            "without, such as Llama, Mistral or Qwen"
        )
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


def joined(tensor: torch.Tensor, spans) -> torch.Tensor:
    """Positions of `spans` along the tokens of (1, H, T, D)."""
    parts = [tensor[:, :, begin:end] for begin, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


AttentionInterface.register(NAME, shared_prefix_attention)
