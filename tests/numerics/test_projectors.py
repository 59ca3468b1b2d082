"""With projectors beyond the paper's, packs on two ranks train as one question at a time does, too."""

import pytest
import torch
from small_run import Case, SmallRun, plain_losses, train_on_rank, zero_options

STEPS = 4
MODELS = {
    "mlp": (("projector", "mlp"), ("projector_width", 48)),
    "resampler": (("projector", "resampler"), ("projector_tokens", 3), ("projector_width", 48)),
}


@pytest.fixture(scope="module")
def make_case(demo_assets, qwen2):
    def make(kind: str | None, zero="zero2") -> Case:
        model = MODELS[kind] if kind else ()
        stage = (("max_steps", STEPS),)
        return Case(str(demo_assets), str(qwen2), "projector", zero_options(zero), stage=stage, model=model)

    return make


@pytest.mark.parametrize("kind", MODELS)
def test_two_ranks_train_as_one_process_does(worlds, make_case, kind):
    losses, norms = plain_losses(make_case(kind))
    assert losses[-1] < 0.98 * losses[0]
    for zero in ("zero2", "zero3"):
        for done in worlds(2)(train_on_rank, make_case(kind, zero)):
            assert done["losses"] == pytest.approx(losses, rel=1e-5)
            assert done["grad_norms"] == pytest.approx(norms, rel=1e-4)


def test_a_resampler_makes_another_plan_and_an_mlp_does_not(make_case):
    """Its prefixes are shorter, so that other groups share a pack: a run of the one is not the other's."""
    linear, mlp, resampler = (SmallRun(make_case(kind)) for kind in (None, "mlp", "resampler"))
    assert linear.plan.fingerprint == mlp.plan.fingerprint != resampler.plan.fingerprint
    groups = resampler.groups(0)
    pack = resampler.data.collate(groups)
    assert len(pack.protein_positions) == 2 * 3 * len(groups)
    tokens = len(resampler.prompt.prefix_ids) + 6
    assert all(int(n) == tokens for n in resampler.data.sizes(0).prefix_tokens)
    assert torch.equal(pack.targets, linear.data.collate(groups).targets)
