"""Bytes counted by hand. What real steps take is measured in tests/numerics/test_estimate.py."""

import pytest
import torch
from transformers import AutoConfig

from proteingpt.cluster.activations import activation_bytes, meta_model, sizes_of
from proteingpt.cluster.memory import Activations, Setting, Sizes, memory, reduce_scratch, state_memory, update_scratch
from proteingpt.cluster.shapes import TINY
from proteingpt.cluster.work import make_pack
from proteingpt.config import ModelConfig

# A frozen LLM of 1,000 parameters and 100 that train, 40 of them in one tensor.
SIZES = Sizes(frozen=1000, trained=100, largest=40, gathered=300)
NONE = Activations(0.0, 0.0)


def setting(
    stage: int, world_size: int = 4, half: bool = True, several: bool = False, on_cpu: bool = True, kept=2**28, **zero
):
    config = {"bf16": {"enabled": half}, "zero_optimization": {"stage": stage, **zero}}
    return Setting.of(SIZES, world_size, config, several, on_cpu, kept)


@pytest.mark.parametrize(
    "stage, half, weights, optimizer",
    [
        (0, False, 4 * 1100, 8 * 100),  # AdamW's two moments beside the weights themselves
        (0, True, 2 * 1100, 12 * 100),  # and fp32 copies of the weights
        (1, True, 2 * 1100, 12 * 25),  # cut over four ranks
        (2, True, 2 * 1100, 12 * 25),
        (2, False, 4 * 1100, 12 * 25),
        (3, True, 2 * 275, 12 * 25),  # weights, too
    ],
)
def test_state_by_stage(stage, half, weights, optimizer):
    state = state_memory(SIZES, setting(stage, half=half))
    assert (state.weights, state.optimizer) == (weights, optimizer)


def test_offload_moves_state_to_the_host():
    """fp32 weights, two moments and gradients, and a 16-bit copy on the way back: 18 bytes of 25 parameters."""
    host = {"device": "cpu"}
    state = state_memory(SIZES, setting(2, offload_optimizer=host))
    assert (state.optimizer, state.host, state.weights) == (0, 18 * 25, 2200)
    state = state_memory(SIZES, setting(3, offload_optimizer=host, offload_param=host))
    assert (state.optimizer, state.host, state.weights) == (0, 18 * 25 + 550, 0)


def test_the_bucket_is_whole_on_a_gpu_and_what_is_written_to_on_a_cpu():
    on_cpu, on_gpu = (
        sum(reduce_scratch(SIZES, setting(2, on_cpu=cpu, reduce_bucket_size=1000))) for cpu in (True, False)
    )
    assert on_cpu == 4 * 100 + 2 * 100 + 2 * 100  # the kept sum in fp32, handed over, in the bucket
    assert on_gpu == 4 * 100 + 2 * 100 + 2 * 1000


def test_the_update_needs_adams_temporaries():
    """On a CPU two of the largest tensor, on a GPU one of everything."""
    assert sum(update_scratch(SIZES, setting(0, half=False))) == 4 * 100 + 8 * 40
    assert sum(update_scratch(SIZES, setting(0, half=False, on_cpu=False))) == 4 * 100 + 4 * 100
    assert sum(update_scratch(SIZES, setting(2))) == (2 + 4) * 25 + 8 * 25  # ZeRO's tensor is the whole share


def test_gradients_of_earlier_forwards_are_kept_beside_the_activations():
    activations = Activations(5000.0, 4900.0)
    once, more = (memory(SIZES, activations, setting(2, several=several)) for several in (False, True))
    assert once.moment == more.moment == "forward and backward"
    assert (once.activations, once.gradients) == (4900, 100)
    assert more.total - once.total == 4 * 100


def test_the_fullest_moment_counts_once():
    """Activations are gone when weights are updated: the total is the larger, not the sum."""
    small = memory(SIZES, NONE, setting(2, half=False))
    large = memory(SIZES, Activations(1e6, 1e6), setting(2, half=False), encoders=7.0)
    assert small.moment != "forward and backward"
    assert large.total == 4 * 1100 + 12 * 25 + 1e6 + 7.0


def test_weights_on_the_way_under_zero_3():
    """Up to `live` whole at once, and those fetched ahead once more; alone, nothing is fetched."""
    config = dict(stage3_max_live_parameters=400, stage3_prefetch_bucket_size=50, reduce_bucket_size=100)
    found = memory(SIZES, Activations(1e6, 1e6), setting(3, **config))
    assert found.weights == 2 * 275 + 2 * (400 + 50)
    assert memory(SIZES, Activations(1e6, 1e6), setting(3, world_size=1, **config)).weights == 2 * 1100


# ----------------------------------------------------------------------------------------------------- counting on meta


def model(train="projector", checkpointing=False, **shape):
    config = AutoConfig.for_model("llama", **{**TINY, **shape})
    return meta_model(config, ModelConfig(train=train, activation_checkpointing=checkpointing), (8, 16), torch.float32)


def test_parameters_are_those_of_the_real_model():
    config = AutoConfig.for_model("llama", **TINY)
    projector = (8 + 1) * 64 + (16 + 1) * 64
    from transformers import AutoModelForCausalLM

    real = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert sizes_of(model()) == Sizes(real, projector, 16 * 64, 512 * 64)
    assert sizes_of(model("full")) == Sizes(0, real + projector, 512 * 64, 512 * 64)


def test_what_a_frozen_layer_keeps_on_a_gpu():
    """By hand, in floats a token: inputs of two norms (2 D), queries and output (2 D), keys and values (2 of D / 2),
    three of the gated MLP (3 I); a frozen linear map keeps nothing. And a float32 a head and a norm."""
    pack = make_pack(2000, 512)
    two, four = (activation_bytes(model(num_hidden_layers=n), pack, (8, 16)).alone for n in (8, 16))
    width, inner, heads = 64, 192, 4
    by_hand = pack.num_tokens * 4 * (4 * width + width + 3 * inner + heads + 2)
    assert (four - two) / 8 == pytest.approx(by_hand, rel=0.01)


def test_checkpointing_keeps_a_layers_input_alone():
    pack = make_pack(2000, 512)
    two, four = (activation_bytes(model(checkpointing=True, num_hidden_layers=n), pack, (8, 16)).alone for n in (8, 16))
    assert (four - two) / 8 == pytest.approx(pack.num_tokens * 4 * 64, rel=0.02)


def test_kept_gradients_are_counted():
    pack = make_pack(300, 512)
    found = activation_bytes(model("full", num_hidden_layers=40), pack, (8, 16))
    assert found.with_gradients > found.alone
    assert activation_bytes(model("lora"), pack, (8, 16)).alone > activation_bytes(model(), pack, (8, 16)).alone
