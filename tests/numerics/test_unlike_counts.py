"""Ranks that run unlike numbers of forwards in a step train as one process does that asks one question at a time."""

import pytest
from small_run import Case, SmallRun, plain_losses, zero_options

STEPS = 4
RELATIVE = 1e-5
# Nine packs a step, one question each, shared out by speeds as given to the plan.
STAGE = {"max_steps": STEPS, "samples_per_step": 9, "questions_per_group": 1, "tokens_per_pack": None}
SPEEDS = {2: (1.0, 2.0), 3: (1.0, 3.0, 5.0)}
COUNTS = {2: (3, 6), 3: (1, 3, 5)}


# ------------------------------------------------------------------------------------------------ what ranks run


def train_on_rank(rank, device, case: Case) -> dict:
    """Losses, gradient norms and the number of this rank's forwards of each step, and how many of them were silent."""
    run = SmallRun(case)
    engine = run.engine()
    recorder = run.train(engine, rank, device)
    work = [run.work(engine, rank, step) for step in range(run.plan.num_steps)]
    engine.close()
    return {
        "losses": recorder.losses,
        "grad_norms": recorder.grad_norms,
        "counts": [len(w.packs) for w in work],
        "silent": [sum(not pack.num_answer_tokens for pack in w.packs) for w in work],
    }


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def make_case(demo_assets, qwen2):
    def make(
        zero="zero0", train="full", speeds=(), bf16=False, tokens_per_forward=None, more=(), kept_at_most=2**28, **stage
    ) -> Case:
        stage = tuple({**STAGE, **stage}.items())
        options = zero_options(zero)
        return Case(str(demo_assets), str(qwen2), train, options, bf16, stage=stage, more=more, speeds=speeds,
                    tokens_per_forward=tokens_per_forward, kept_at_most=kept_at_most)  # fmt: skip

    return make


@pytest.fixture(scope="module")
def plain(make_case):
    """plain(train, ...): (losses, gradient norms) of the definition."""
    kept = {}

    def losses(train: str, **stage):
        key = (train, tuple(stage.items()))
        if key not in kept:
            kept[key] = plain_losses(make_case(train=train, **stage))
        return kept[key]

    return losses


def run(world, case: Case) -> list[dict]:
    by_rank = world(train_on_rank, case)
    assert all(done["losses"] == by_rank[0]["losses"] for done in by_rank), "ranks disagree on the loss"
    assert all(done["grad_norms"] == by_rank[0]["grad_norms"] for done in by_rank), "ranks disagree on the gradient"
    return by_rank


def counts_of(by_rank) -> list[tuple[int, ...]]:
    """Forwards on each rank, step by step."""
    return list(zip(*(done["counts"] for done in by_rank)))


def check(by_rank, plain_run):
    losses, norms = plain_run
    assert by_rank[0]["losses"] == pytest.approx(losses, rel=RELATIVE)
    assert by_rank[0]["grad_norms"] == pytest.approx(norms, rel=RELATIVE)


@pytest.mark.parametrize("train", ["full", "projector"])
@pytest.mark.parametrize("num_ranks", SPEEDS)
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero2_offload"])
def test_each_rank_runs_its_own_number_of_forwards(worlds, make_case, plain, zero, num_ranks, train):
    by_rank = run(worlds(num_ranks), make_case(zero, train, SPEEDS[num_ranks]))
    assert COUNTS[num_ranks] in counts_of(by_rank)
    assert all(len(set(counts)) == num_ranks for counts in counts_of(by_rank))
    check(by_rank, plain(train))


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero2_offload"])
def test_so_where_the_gradients_are_too_large_to_keep_and_go_to_deepspeed_as_they_are_made(
    worlds, make_case, plain, zero
):
    by_rank = run(worlds(3), make_case(zero, "full", SPEEDS[3], kept_at_most=0))
    assert COUNTS[3] in counts_of(by_rank)
    check(by_rank, plain("full"))


@pytest.mark.parametrize("train", ["full", "projector"])
@pytest.mark.parametrize("num_ranks", SPEEDS)
def test_under_zero_3_the_counts_are_equal_and_the_rest_is_silent(worlds, make_case, plain, num_ranks, train):
    by_rank = run(worlds(num_ranks), make_case("zero3", train, SPEEDS[num_ranks]))
    assert all(len(set(counts)) == 1 for counts in counts_of(by_rank))
    assert all(silent > 0 for silent in by_rank[0]["silent"])
    assert not any(by_rank[-1]["silent"])
    check(by_rank, plain(train))


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_a_rank_that_gets_nothing_beside_ones_that_run_several(worlds, make_case, plain, zero):
    by_rank = run(worlds(3), make_case(zero, "full", (1e-3, 1.0, 1.0)))
    assert all(silent == count for silent, count in zip(by_rank[0]["silent"], by_rank[0]["counts"]))
    assert all(max(counts) >= 4 for counts in counts_of(by_rank))
    check(by_rank, plain("full"))


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_counts_that_change_from_step_to_step(worlds, make_case, plain, zero):
    """Five or six packs of unlike lengths, joined where they fit: one forward on all ranks here, several there."""
    stage = {"samples_per_step": 12, "questions_per_group": 3, "tokens_per_pack": 300}
    by_rank = run(worlds(2), make_case(zero, "full", (1.0, 1.3), tokens_per_forward=520, **stage))
    assert len(set(counts_of(by_rank))) > 1
    check(by_rank, plain("full", **stage))


def test_steps_of_tokens(worlds, make_case, plain):
    """The fast recipes' kind of step, with questions drawn anew in each epoch."""
    stage = {"samples_per_step": None, "tokens_per_step": 1500, "tokens_per_pack": 300, "questions_per_group": 4,
             "questions_per_protein": 3, "epochs": 3}  # fmt: skip
    by_rank = run(worlds(2), make_case("zero2", "full", (1.0, 2.0), **stage))
    assert any(len(set(counts)) == 2 for counts in counts_of(by_rank))
    check(by_rank, plain("full", **stage))


FP32_GRADIENTS = (("data_types", {"grad_accum_dtype": "fp32"}),)


@pytest.mark.parametrize(
    "zero, more", [("zero0", ()), ("zero1", ()), ("zero1", FP32_GRADIENTS), ("zero2", ()), ("zero3", ())]
)
def test_bf16_stays_near(worlds, make_case, plain, zero, more):
    """With unlike counts, under each of DeepSpeed's 16-bit optimizers."""
    losses, norms = plain("full")
    by_rank = run(worlds(2), make_case(zero, "full", SPEEDS[2], bf16=True, more=more))
    assert by_rank[0]["losses"] == pytest.approx(losses, rel=0.01)
    assert by_rank[0]["grad_norms"] == pytest.approx(norms, rel=0.1)


def test_the_comparison_can_fail(plain, make_case):
    """A mean of means over ranks would be another loss: the packs are of unlike numbers of answer tokens."""
    run_of = SmallRun(make_case())
    for step in range(STEPS):
        groups = run_of.groups(step)
        assert len({run_of.data.answer_tokens([group]) for group in groups}) > 1
    losses, norms = plain("full")
    assert max(norms) > 1 and losses[-1] < losses[0]
