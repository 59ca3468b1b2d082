"""A frozen LLM in 8 bits: near the one it was made of, frozen, and under adapters."""

import importlib.util

import pytest
import torch

from proteingpt.config import LoraConfig, ModelConfig
from proteingpt.demo.llm import write_tiny_llm
from proteingpt.model import assemble


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_llm(tmp_path_factory.mktemp("llm"), ["some words"], family="qwen2", width=64, vocab_size=280)


def build(directory, train: str, eight_bit: bool, **more):
    config = ModelConfig(llm=str(directory), train=train, llm_8bit=eight_bit, **more)
    return assemble.build_model(config, 12, 20, torch.float32, 3)


def loss_and_gradients(model):
    """Of next words behind a protein of three residues: the loss, and the gradients of what trains, as one vector."""
    generator = torch.Generator().manual_seed(8)
    rows = [torch.randn(5, width, generator=generator) for width in (12, 20)]
    model.llm.set_attn_implementation("eager")
    embedded = model.embed(torch.arange(3, 23), torch.arange(4, 14), [rows[0]], [rows[1]])
    logits = model.llm(inputs_embeds=embedded[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[14:19], torch.arange(18, 23))
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("train, more", [("projector", {}), ("lora", {"lora": LoraConfig(rank=4)})])
def test_losses_and_gradients_are_near_those_of_the_whole(directory, train, more):
    """8 bits of a row keep about two decimal digits; a layer that was lost would be far outside."""
    (loss, found), (wanted_loss, wanted) = (
        loss_and_gradients(build(directory, train, b, **more)) for b in (True, False)
    )
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-3) and loss.item() != wanted_loss.item()
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_linear_layers_but_for_the_head_take_a_byte_a_weight_and_are_frozen(directory):
    model = build(directory, "projector", True)
    kinds = {name: p.dtype for name, p in model.llm.named_parameters()}
    assert {kinds[f"model.layers.1.{n}.weight"] for n in ("self_attn.o_proj", "mlp.up_proj")} == {torch.int8}
    assert kinds["model.embed_tokens.weight"] == torch.float32
    assert not any(p.requires_grad for p in model.llm.parameters())


def test_without_the_library_the_error_names_it(directory, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assemble.ModelError, match=r"needs the package bitsandbytes: pip install 'proteingpt\[8bit\]'"):
        build(directory, "projector", True)
