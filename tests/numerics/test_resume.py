"""A run is saved under one ZeRO stage and number of ranks and goes on under another, as if nothing had happened."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from small_run import SEED, Case, plain_losses, train_on_rank, zero_options
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from proteingpt.training import checkpoint

SAVED, STEPS = 3, 6
RELATIVE = 1e-5

# (stage, ranks) that saves, (stage, ranks) that goes on. Two and three ranks divide few of the sizes.
PAIRS = [
    (("zero0", 1), ("zero3", 2)),
    (("zero3", 2), ("zero0", 1)),
    (("zero2", 2), ("zero3", 3)),
    (("zero3", 3), ("zero2", 2)),
    (("zero1", 2), ("zero1", 1)),
    (("zero2", 1), ("zero2", 2)),
    (("zero2_offload", 2), ("zero3_offload", 2)),
    (("zero3_offload", 2), ("zero2_offload", 1)),
    (("zero3", 2), ("zero3", 2)),
]


def name_of(pair) -> str:
    (stage, ranks), (other_stage, other_ranks) = pair
    return f"{stage}x{ranks}-{other_stage}x{other_ranks}"


@pytest.fixture(scope="module")
def make_case(demo_assets, qwen2):
    def make(stage: str, train: str = "full", bf16: bool = False) -> Case:
        return Case(str(demo_assets), str(qwen2), train, zero_options(stage), bf16, stage=(("max_steps", STEPS),))

    return make


@pytest.fixture(scope="module")
def plain(make_case, whole_run):
    """Losses of the uninterrupted run, by the plain definition; of adapters by one process (numerics/test_lora.py holds
    it to theirs)."""
    by_definition = {train: plain_losses(make_case("zero0", train))[0] for train in ("full", "projector")}
    return {**by_definition, "lora": whole_run("zero0", 1, "lora")["losses"]}


@pytest.fixture(scope="module")
def whole_run(worlds, make_case):
    """whole_run(stage, ranks, ...): all six steps, and the state after three as "saved"."""
    kept = {}

    def run(stage: str, ranks: int, train: str = "full", bf16: bool = False):
        key = (stage, ranks, train, bf16)
        if key not in kept:
            kept[key] = worlds(ranks)(train_on_rank, make_case(stage, train, bf16), 0, None, SAVED)[0]
        return kept[key]

    return run


def assert_same_state(found, wanted):
    """By name, bit for bit, and not all zeros."""
    assert found.keys() == wanted.keys() == {"weights", "exp_avg", "exp_avg_sq"}
    for kind in wanted:
        assert found[kind].keys() == wanted[kind].keys()
        for name, value in wanted[kind].items():
            assert value.dtype == torch.float32 and torch.equal(found[kind][name], value), f"{kind} of {name}"
            assert value.any(), f"{kind} of {name} is zero throughout: nothing was saved"


SOME = [PAIRS[0], PAIRS[2], PAIRS[4]]
TRAINED = [("full", pair) for pair in PAIRS] + [(train, pair) for train in ("projector", "lora") for pair in SOME]


@pytest.mark.parametrize("train, pair", TRAINED, ids=lambda v: v if isinstance(v, str) else name_of(v))
def test_a_run_goes_on_under_another_stage_and_number_of_ranks(
    worlds, make_case, whole_run, plain, tmp_path, train, pair
):
    """By way of a checkpoint's files, whatever trains."""
    (stage, ranks), (next_stage, next_ranks) = pair
    state = whole_run(stage, ranks, train)["saved"]
    checkpoint.save(tmp_path, state, checkpoint.Progress("instruct", SAVED, STEPS, "plan"), keep_last=1)
    read = checkpoint.read_state(checkpoint.newest_valid(tmp_path))
    done = worlds(next_ranks)(train_on_rank, make_case(next_stage, train), SAVED, read)[0]
    assert_same_state(done["begun_with"], state)
    assert done["losses"] == pytest.approx(plain[train][SAVED:], rel=RELATIVE)


BF16_PAIRS = [
    (("zero2", 2), ("zero3", 3)),
    (("zero3", 2), ("zero1", 2)),
    (("zero0", 2), ("zero2", 1)),
    (("zero2", 2), ("zero0", 1)),
]


@pytest.mark.parametrize("pair", BF16_PAIRS, ids=name_of)
def test_bf16_keeps_its_master_weights_and_moments(worlds, make_case, whole_run, pair):
    """The fp32 masters hold what bf16 would round away."""
    (stage, ranks), (next_stage, next_ranks) = pair
    uninterrupted = whole_run(stage, ranks, bf16=True)
    state = uninterrupted["saved"]
    assert any(not torch.equal(value, value.bfloat16().float()) for value in state["weights"].values())
    done = worlds(next_ranks)(train_on_rank, make_case(next_stage, bf16=True), SAVED, state)[0]
    assert_same_state(done["begun_with"], state)
    assert done["losses"] == pytest.approx(uninterrupted["losses"][SAVED:], rel=2e-3)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_on_the_same_ranks_and_stage_it_repeats_itself_to_the_bit(worlds, make_case, whole_run, bf16):
    uninterrupted = whole_run("zero2", 2, bf16=bf16)
    done = worlds(2)(train_on_rank, make_case("zero2", bf16=bf16), SAVED, uninterrupted["saved"])[0]
    assert done["losses"] == uninterrupted["losses"][SAVED:]
    assert_same_state(done["ended_with"], uninterrupted["ended_with"])


@pytest.fixture(scope="module")
def phi(qwen2, tmp_path_factory):
    """A tiny LLM that drops out by itself while it trains, as the published ones of this family do."""
    directory, tokenizer = tmp_path_factory.mktemp("phi"), AutoTokenizer.from_pretrained(qwen2)
    config = AutoConfig.for_model(
        "phi", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=4096, resid_pdrop=0.3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_what_an_llm_drops_by_itself_is_dropped_again(worlds, make_case, phi):
    """No state of a random generator is kept: what is random is drawn from the seed and the pack."""
    case = replace(make_case("zero2"), llm=str(phi))
    whole = worlds(2)(train_on_rank, case, 0, None, SAVED)[0]
    assert worlds(2)(train_on_rank, case, SAVED, whole["saved"])[0]["losses"] == whole["losses"][SAVED:]
    still = worlds(2)(train_on_rank, replace(case, llm=str(without_dropout(phi))), 0)[0]
    assert still["losses"] != pytest.approx(whole["losses"], rel=1e-4), "nothing was dropped"


def without_dropout(llm):
    """The same weights."""
    directory = llm.with_name("still")
    shutil.copytree(llm, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "resid_pdrop": 0.0}))
    return directory
