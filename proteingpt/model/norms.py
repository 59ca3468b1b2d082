"""RMS norms of the LLM by one kernel on a GPU, where transformers runs six, in float32, and keeps their results.

Read and reckoned, not measured: of a frozen 8B's forward pass the norms' memory traffic is about a tenth, and what they
keep for the backward pass a quarter of all activations. On a CPU they stay transformers' own.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

# Those that compute weight * x / rms(x). Gemma's adds one to its weight, and stays as it is.
PLAIN = ("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def fuse_norms(llm: nn.Module):
    for module in llm.modules():
        if type(module).__name__ in PLAIN:
            module.forward = functools.partial(norm, module)


def norm(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    if hidden.device.type == "cpu":
        return type(module).forward(module, hidden)
    return fused(hidden, module.weight, module.variance_epsilon)


def fused(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """(.., D), (D,) -> (.., D), in the precision of `hidden`; within, float32 at least."""
    return F.rms_norm(hidden, weight.shape, weight.to(hidden.dtype), epsilon)
