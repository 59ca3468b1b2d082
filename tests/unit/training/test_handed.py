"""Gradients that are handed over arrive as they are, times what is before them, in each parameter's own type."""

import torch
from torch import nn

from proteingpt.training.handed import Trained, wide


def test_each_parameter_that_trains_has_the_gradient_that_was_given():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, dtype=torch.bfloat16))
    model[0].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    given = [torch.full(p.shape, float(number + 1)) for number, p in enumerate(trained)]
    (2 * Trained(model)(handed=given)).backward()
    for parameter, gradient in zip(trained, given, strict=True):
        assert parameter.grad.dtype == parameter.dtype and torch.equal(parameter.grad.float(), 2 * gradient)
    assert model[0].bias.grad is None


def test_without_gradients_it_is_the_model():
    model = nn.Linear(3, 2)
    inputs = torch.ones(1, 3)
    assert torch.equal(Trained(model)(inputs), model(inputs))


def test_gradients_are_added_up_in_32_bits_at_least():
    assert [wide(t) for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)] == [
        torch.float32, torch.float32, torch.float32, torch.float64,
    ]  # fmt: skip
