"""What a token costs, against a count of the matrices that it meets."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from proteingpt.model.flops import flops_of_tokens

CONFIG = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50,
)  # fmt: skip
# q and o; k and v of half the heads; gate, up and down.
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96


@pytest.mark.parametrize("train, passes", [("projector", 4), ("lora", 4), ("full", 6)])
def test_a_token_meets_every_matrix_of_the_layers_and_an_answer_token_the_head(train, passes):
    assert flops_of_tokens(AutoConfig.for_model("llama", **CONFIG), train) == (passes * 3 * LAYER, passes * 64 * 50)


@pytest.mark.parametrize("train", ["projector", "full"])
def test_it_is_what_torch_counts_in_a_real_step_but_for_attention(train):
    """One token, so that attention is a thousandth; all of them answers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **CONFIG, attn_implementation="eager")
    llm = AutoModelForCausalLM.from_config(config).requires_grad_(train == "full")
    embedded = torch.randn(1, 1, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        llm(inputs_embeds=embedded).logits.sum().backward()
    token, answer = flops_of_tokens(config, train)
    assert counter.get_total_flops() == pytest.approx(token + answer, rel=0.02)


def test_counting_draws_no_random_number():
    """A run that is watched must draw the same ones as one that is not."""
    config = AutoConfig.for_model("llama", **{**CONFIG, "vocab_size": 51})
    before = torch.get_rng_state()
    flops_of_tokens(config, "full")
    assert torch.equal(torch.get_rng_state(), before)
