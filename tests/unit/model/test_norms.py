"""The fused norm is transformers' own norm."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from proteingpt.model.norms import PLAIN, fuse_norms, fused

NORMS = (LlamaRMSNorm, MistralRMSNorm, MixtralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # bf16: one rounding here, two there


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_values_and_gradients_are_those_of_transformers(kind, dtype):
    torch.manual_seed(0)
    module = kind(24, eps=1e-5).to(dtype)
    nn.init.normal_(module.weight)
    hidden = (3 * torch.randn(1, 7, 24)).to(dtype).requires_grad_()
    direction = torch.randn(1, 7, 24).to(dtype)
    sides = module(hidden), fused(hidden, module.weight, module.variance_epsilon)
    gradients = [torch.autograd.grad(side, (hidden, module.weight), direction) for side in sides]
    for wanted, found in zip((sides[0], *gradients[0]), (sides[1], *gradients[1])):
        assert found.dtype == dtype
        assert float((found - wanted).detach().float().norm() / wanted.detach().float().norm()) < TOLERANCE[dtype]


def test_only_norms_of_that_formula_are_changed():
    assert {kind.__name__ for kind in NORMS} == set(PLAIN)
    gemma, llama = GemmaRMSNorm(8), LlamaRMSNorm(8)
    fuse_norms(nn.ModuleList([gemma, llama]))
    assert "forward" in vars(llama) and "forward" not in vars(gemma)


def test_a_cpu_keeps_transformers_own_to_the_bit():
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    before = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    fuse_norms(model)
    assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, before)
