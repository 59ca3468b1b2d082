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


@dataclass(frozen=True)
class Layout:
    """Where each group lies in the row, and who sees whom inside it: [(begin, end, bool mask (n, n)), ...]."""

    groups: list[tuple[int, int, torch.Tensor]]


def group_mask(branch_ids: torch.Tensor) -> torch.Tensor:
    """bool (n, n) for one group: token i sees j <= i if j is on the shared prefix (0) or on i's own branch."""
    query, key = branch_ids[:, None], branch_ids[None, :]
    causal = torch.ones(len(branch_ids), len(branch_ids), dtype=torch.bool, device=branch_ids.device).tril()
    return causal & ((key == 0) | (key == query))


def make_layout(group_starts: list[int], branch_ids: torch.Tensor) -> Layout:
    spans = zip(group_starts, group_starts[1:])
    return Layout([(begin, end, group_mask(branch_ids[begin:end])) for begin, end in spans])


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
            query[:, :, begin:end],
            key[:, :, begin:end],
            value[:, :, begin:end],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=grouped_query,
        )
        for begin, end, mask in layout.groups
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)
