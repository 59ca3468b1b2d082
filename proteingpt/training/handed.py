"""Gradients that are handed to DeepSpeed as if a backward had just made them."""

import torch
from torch import nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """What gradients of `dtype` are added up in."""
    return torch.promote_types(dtype, torch.float32)


class Handed(torch.autograd.Function):
    """A scalar whose gradient with respect to each parameter is the tensor given beside it."""

    @staticmethod
    def forward(ctx, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients, ctx.dtypes = gradients, [p.dtype for p in parameters]
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx, scale: torch.Tensor):
        return None, *((g * scale).to(dtype) for g, dtype in zip(ctx.gradients, ctx.dtypes, strict=True))


class Trained(nn.Module):
    """What DeepSpeed is given: the model, or `handed` gradients in its place, through the same front door."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs, handed: list[torch.Tensor] | None = None) -> torch.Tensor:
        if handed is None:
            return self.model(*inputs)
        return Handed.apply(handed, *(p for p in self.model.parameters() if p.requires_grad))
