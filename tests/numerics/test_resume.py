"""A run is saved under one ZeRO stage and number of ranks and goes on under another, as if nothing had happened."""

import pytest
import torch
from small_run import Case, plain_losses, train_on_rank, zero_options

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
def plain(make_case):
    """Losses of the uninterrupted run, by the plain definition."""
    return {train: plain_losses(make_case("zero0", train))[0] for train in ("full", "projector")}


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


def check(worlds, make_case, whole_run, losses, pair, train):
    (stage, ranks), (next_stage, next_ranks) = pair
    state = whole_run(stage, ranks, train)["saved"]
    done = worlds(next_ranks)(train_on_rank, make_case(next_stage, train), SAVED, state)[0]
    assert_same_state(done["begun_with"], state)
    assert done["losses"] == pytest.approx(losses[SAVED:], rel=RELATIVE)


@pytest.mark.parametrize("pair", PAIRS, ids=name_of)
def test_a_run_goes_on_under_another_stage_and_number_of_ranks(worlds, make_case, whole_run, plain, pair):
    check(worlds, make_case, whole_run, plain["full"], pair, "full")


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2], PAIRS[4]], ids=name_of)
def test_so_does_one_that_trains_the_projector_alone(worlds, make_case, whole_run, plain, pair):
    check(worlds, make_case, whole_run, plain["projector"], pair, "projector")


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
