"""Whatever the ZeRO stage and the number of ranks, training is that of one process that asks one question at a time."""

import pytest
from small_run import Case, SmallRun, plain_losses, train_on_rank, zero_options

STEPS = 5
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def plain(demo_assets, qwen2):
    """{what trains: (losses, gradient norms)} of the plain definition, of twelve and of four questions a step."""
    kept = {}

    def losses(train: str, **stage):
        key = (train, tuple(stage.items()))
        if key not in kept:
            kept[key] = plain_losses(make_case(demo_assets, qwen2, train=train, **stage))
        return kept[key]

    return losses


def make_case(assets, llm, train="full", zero=None, bf16=False, **stage) -> Case:
    stage = tuple({"max_steps": STEPS, **stage}.items())
    return Case(str(assets), str(llm), train, zero and zero_options(zero), bf16, stage=stage)


def run(world, case) -> dict:
    by_rank = world(train_on_rank, case)
    assert all(done["losses"] == by_rank[0]["losses"] for done in by_rank), "ranks disagree on the loss"
    return by_rank[0]


@pytest.mark.parametrize("train", ["full", "projector"])
@pytest.mark.parametrize("zero", STAGES)
def test_two_ranks_train_as_one_process_does(worlds, plain, demo_assets, qwen2, zero, train):
    losses, norms = plain(train)
    done = run(worlds(2), make_case(demo_assets, qwen2, train, zero))
    assert done["losses"] == pytest.approx(losses, rel=RELATIVE)
    assert done["grad_norms"] == pytest.approx(norms, rel=1e-4)
    assert done["samples"] == [sum(map(len, turns)) for turns in turns_of(demo_assets, qwen2)]


def turns_of(assets, llm):
    run = SmallRun(make_case(assets, llm))
    return [[turns for _, turns in run.groups(step)] for step in range(STEPS)]


def test_the_comparison_covers_clipping_and_uneven_ranks(plain, demo_assets, qwen2):
    """What would otherwise hide an error: gradients below the clipping norm, or as many groups on each rank."""
    for train in ("full", "projector"):
        losses, norms = plain(train)
        assert max(norms) > 1 and losses[-1] < losses[0]
    assert any(len(groups) % 2 for groups in turns_of(demo_assets, qwen2))


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_ranks_without_a_group_run_in_silence(worlds, plain, demo_assets, qwen2, zero):
    """One group a step, three ranks."""
    losses, norms = plain("full", samples_per_step=4)
    done = run(worlds(3), make_case(demo_assets, qwen2, "full", zero, samples_per_step=4))
    assert done["losses"] == pytest.approx(losses, rel=RELATIVE)
    assert done["grad_norms"] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_bf16_stays_near(worlds, plain, demo_assets, qwen2, zero):
    """The loss falls by more than a tenth in these steps, so that a run which stood still would be far outside."""
    losses, _ = plain("full")
    done = run(worlds(2), make_case(demo_assets, qwen2, "full", zero, bf16=True))
    assert losses[-1] < 0.9 * losses[0]
    assert done["losses"] == pytest.approx(losses, rel=0.01)
