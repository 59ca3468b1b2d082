"""A loss or a gradient that is not finite, on one rank: every rank skips the step, the samples are named, no weight
sees it, and training goes on as if the step had not been. If it does not stop, the run does, with the reason."""

import math

import pytest
import torch
from small_run import Case, SmallRun, plain_losses, zero_options
from torch import nn

from proteingpt.config import GuardConfig
from proteingpt.training.guard import Guard, NonFiniteLoss, RollBack

RELATIVE = 1e-5
BAD_STEP, BAD_RANK = 2, 1


class NaNBackward(torch.autograd.Function):
    """A forward that is as it should be, and a gradient that is not."""

    @staticmethod
    def forward(ctx, rows):
        return rows.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class Saboteur:
    """The encoders, which give the proteins of `keys` (all, if None) a NaN in the steps `at`, as a bad sample on a disk
    would; or which leave them be and turn the projector's gradient into NaN."""

    def __init__(self, encoders, engine, kind: str, at, keys=None):
        self.encoders, self.kind, self.at, self.keys, self.step = encoders, kind, at, keys, 0
        if kind == "gradient":
            self.model = engine.module
            self.model.projector.register_forward_hook(self.spoil)

    def spoil(self, module, inputs, output):
        return NaNBackward.apply(output) if self.step in self.at and self.model.training else output

    def encode(self, proteins, *made):
        structure, sequence = self.encoders.encode(proteins, *made)
        if self.kind == "loss" and self.step in self.at:
            hit = [self.keys is None or protein.key in self.keys for protein in proteins]
            structure = [rows * math.nan if h else rows for rows, h in zip(structure, hit)]
        return structure, sequence


def train_with_nan(rank, device, case, kind: str, at: tuple, config: GuardConfig, keys=None, everywhere=False) -> dict:
    """The real loop. at: the steps that are bad on BAD_RANK, or everywhere."""
    run = SmallRun(case)
    engine = run.engine()
    encoders = Saboteur(run.encoders, engine, kind, at if everywhere or rank.rank == BAD_RANK else (), keys)
    guard, aside, raised = Guard(config), [], None
    states = {0: (engine.get_state(), local_weights(engine))}

    def after_step(step: int):
        encoders.step = step
        states[step] = (engine.get_state(), local_weights(engine))

    try:
        recorder = run.train(
            engine, rank, device, encoders=encoders, after_step=after_step, guard=guard,
            set_aside=lambda step, keys, why: aside.append((step, keys)),
        )  # fmt: skip
    except (NonFiniteLoss, RollBack) as error:
        raised, recorder = error, None
    states["last"] = (engine.get_state(), local_weights(engine))
    mine = [pack.keys for pack in run.work(engine, rank, at[0]).packs]
    engine.close()
    first = at[0]
    return {
        "losses": recorder and recorder.losses,
        "norms": recorder and recorder.grad_norms,
        "said": str(raised),
        "raised": type(raised).__name__,
        "guard": guard.state,
        "aside": aside,
        "mine": mine,
        "unchanged": same(states[first], states.get(first + 1, states["last"])),
        "finite": all(value.isfinite().all() for kind in states["last"][0].values() for value in kind.values()),
    }


def same(before, after) -> bool:
    (old, old_local), (new, new_local) = before, after
    states = all(torch.equal(new[k][n], value) for k, kind in old.items() for n, value in kind.items())
    return states and all(torch.equal(a, b) for a, b in zip(old_local, new_local, strict=True))


def local_weights(engine) -> list[torch.Tensor]:
    """Copies of what this rank computes with: whole parameters, or its share under ZeRO 3."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]


# A group a pack: three packs a step, shared out 1 and 2.
STAGE = (("tokens_per_pack", None),)
WHERE = [("zero0", 2**28), ("zero1", 2**28), ("zero2", 2**28), ("zero2", 0), ("zero3", 0)]


@pytest.fixture(scope="module")
def make_case(demo_assets, qwen2):
    def make(zero="zero0", kept_at_most=2**28, bf16=False, stage=STAGE):
        options = zero_options(zero)
        return Case(str(demo_assets), str(qwen2), "full", options, bf16, stage=stage, kept_at_most=kept_at_most)

    return make


@pytest.fixture(scope="module")
def plain(make_case):
    return plain_losses(make_case(), skipped=frozenset([BAD_STEP]))


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("zero, kept_at_most", WHERE)
def test_all_ranks_skip_the_step_and_the_rest_is_as_without_it(worlds, make_case, plain, zero, kept_at_most, kind):
    ranks = worlds(2)(train_with_nan, make_case(zero, kept_at_most), kind, (BAD_STEP,), GuardConfig())
    losses, norms = plain
    for done in ranks:
        assert done["unchanged"] and done["finite"] and done["guard"] == ranks[0]["guard"]
        assert done["guard"].not_taken == 1 and done["guard"].skipped == (BAD_STEP,)
        taken = [step for step in range(len(done["losses"])) if step != BAD_STEP]
        assert [done["losses"][step] for step in taken] == pytest.approx(losses, rel=RELATIVE)
        assert [done["norms"][step] for step in taken] == pytest.approx(norms, rel=RELATIVE)
    named = {key for key, _ in ranks[0]["guard"].strikes}
    bad = {key for keys in ranks[BAD_RANK]["mine"] for key in keys}
    if kind == "loss" or kept_at_most:
        assert named == bad  # of both its packs
    else:
        assert named >= bad  # DeepSpeed has added it up by the time that it is seen


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_in_bf16_too(worlds, make_case, zero):
    for done in worlds(2)(train_with_nan, make_case(zero, bf16=True), "loss", (BAD_STEP,), GuardConfig()):
        assert done["unchanged"] and done["finite"] and done["guard"].skipped == (BAD_STEP,)


@pytest.mark.parametrize("zero, kept_at_most", [WHERE[2], WHERE[4]])
def test_where_it_does_not_end_every_rank_stops_and_names_the_samples(worlds, make_case, zero, kept_at_most):
    config = GuardConfig(roll_back_after=2, roll_backs=0)
    ranks = worlds(2)(train_with_nan, make_case(zero, kept_at_most), "loss", (2, 3, 4, 5), config)
    assert ranks[0]["said"] == ranks[1]["said"] and {done["raised"] for done in ranks} == {"NonFiniteLoss"}
    assert "step 3: its loss is not finite" in ranks[0]["said"] and "no weight has changed" in ranks[0]["said"]
    assert "with samples " in ranks[0]["said"]
    assert all(done["unchanged"] and done["finite"] for done in ranks)


def test_before_that_it_asks_to_go_back(worlds, make_case):
    config = GuardConfig(roll_back_after=2, roll_backs=1)
    for done in worlds(2)(train_with_nan, make_case("zero2"), "loss", (2, 3, 4, 5), config):
        assert done["raised"] == "RollBack" and done["guard"].passed_over == (2, 3) and done["unchanged"]


def test_a_poison_sample_is_quarantined_at_its_second_step_and_has_no_weight_from_then_on(worlds, make_case):
    """It comes once an epoch: skipped, skipped and quarantined, and then silent, beside samples that train."""
    stage = (("tokens_per_pack", None), ("epochs", 3), ("max_steps", None), ("questions_per_protein", 2))
    case = make_case("zero2", stage=stage)
    run = SmallRun(case)
    poison = run.data.shards.keys[run.groups(0)[0][0]]
    steps = [n for n in range(run.plan.num_steps) if any(run.data.shards.keys[s] == poison for s, _ in run.groups(n))]
    assert len(steps) == 3
    every = tuple(range(run.plan.num_steps))
    ranks = worlds(2)(train_with_nan, case, "loss", every, GuardConfig(), (poison,), True)
    losses, _ = plain_losses(case, frozenset([poison]), frozenset(steps[:2]))
    for done in ranks:
        assert done["guard"].skipped == tuple(steps[:2]) and poison in done["guard"].quarantined
        assert [step for step, keys in done["aside"] if poison in keys] == [steps[1]]
    alone = ranks[0]["guard"].quarantined == (poison,)
    taken = [loss for step, loss in enumerate(ranks[0]["losses"]) if step not in steps[:2]]
    assert alone and taken == pytest.approx(losses, rel=RELATIVE)


def test_the_gradient_that_is_spoiled_would_reach_the_weights():
    """Or these tests would prove nothing: the loss is as ever."""
    layer = nn.Linear(2, 1)
    loss = NaNBackward.apply(layer(torch.ones(2))).sum()
    loss.backward()
    assert loss.isfinite() and not layer.weight.grad.isfinite().any()
