"""DeepSpeed behind our class: what it is told, and that it does what it is told."""

import pytest
import torch
from small_run import Case, SmallRun, zero_options
from torch import nn

from proteingpt.config import ConfigError
from proteingpt.training.engine import parameter_groups, precision

# --------------------------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize(
    "ds_config, wanted",
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"bf16": {"enabled": False}}, torch.float32),
        ({"bf16": {}, "fp16": {}}, torch.float32),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, torch.bfloat16),
    ],
)
def test_the_json_chooses_the_precision(ds_config, wanted):
    assert precision(ds_config) is wanted


def test_two_precisions_are_refused():
    with pytest.raises(ConfigError, match="bf16 and fp16"):
        precision({"bf16": {"enabled": True}, "fp16": {"enabled": True}})


def test_fp16_is_refused_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="fp16.*CPU"):
        precision({"fp16": {"enabled": True}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision({"fp16": {"enabled": True}}) is torch.float16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.tied = self.linear


def test_matrices_decay_and_vectors_do_not():
    model = Model()
    matrices, vectors = parameter_groups(model, 0.05)
    assert matrices["weight_decay"] == 0.05 and vectors["weight_decay"] == 0.0
    assert [id(p) for p in matrices["params"]] == [id(model.linear.weight)]
    wanted = {model.linear.bias, model.norm.weight, model.norm.bias, model.scale}
    assert {id(p) for p in vectors["params"]} == {id(p) for p in wanted} and len(vectors["params"]) == 4


def test_a_group_without_parameters_is_left_out():
    model = nn.Linear(2, 2, bias=False)
    assert parameter_groups(model, 0.1) == [{"params": [model.weight], "weight_decay": 0.1}]


# -------------------------------------------------------------------------------------------------- on one rank

STAGES = ["zero0", "zero1", "zero2", "zero3"]


@pytest.fixture
def make_case(demo_assets, qwen2):
    def make(zero="zero0", train="projector", bf16=False, more=(), **stage):
        stage = tuple({"samples_per_step": 4, **stage}.items())
        return Case(str(demo_assets), str(qwen2), train, zero_options(zero), bf16, stage=stage, more=tuple(more))

    return make


def one_update(rank, device, case, learning_rate: float) -> dict:
    """Master weights before and after a step, by name, the model's own afterwards, and the optimizer's count."""
    run = SmallRun(case)
    engine = run.engine()
    model_before = {name: p.clone() for name, p in run.model().named_parameters() if p.requires_grad}
    before = engine.get_state()
    work = run.work(engine, rank, 0)
    with engine.accumulating(work.several):
        for pack in work.packs:
            loss = engine.forward(pack, *run.encoders.encode(pack.proteins))
            engine.backward(loss, work.answer_tokens, is_last=pack is work.packs[-1])
    engine.step(learning_rate)
    after = engine.get_state()
    result = {
        "model_before": model_before,
        "before": before,
        "after": after,
        "gradient_clipping": engine.deepspeed.gradient_clipping(),
        "grad_norm": engine.grad_norm,
    }
    engine.close()
    return result


def largest_step(result, name: str) -> float:
    return float((result["after"]["weights"][name] - result["before"]["weights"][name]).abs().max())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", STAGES)
def test_an_engine_begins_with_the_models_weights_and_an_optimizer_at_rest(worlds, make_case, zero, bf16):
    """DeepSpeed's wrapper of 16-bit stage 0 takes an AdamW step, decay included, while it is made."""
    (result,) = worlds(1)(one_update, make_case(zero, bf16=bf16, weight_decay=0.5, init_lr=0.1), 1e-3)
    for name, value in result["model_before"].items():
        assert torch.equal(result["before"]["weights"][name], value.float()), name
        assert not result["before"]["exp_avg"][name].any() and not result["before"]["exp_avg_sq"][name].any()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", STAGES)
def test_the_learning_rate_given_is_the_one_applied(worlds, make_case, zero, bf16):
    """Adam's first step moves every weight by the learning rate (Kingma & Ba 2015, section 2.1), whatever its gradient.
    Of a bias, which has no decay: so neither the rate of the recipe nor another count of steps has entered."""
    rate = 3e-3
    (result,) = worlds(1)(one_update, make_case(zero, bf16=bf16, weight_decay=0.5), rate)
    for name in ("projector.structure.bias", "projector.sequence.bias"):
        assert largest_step(result, name) == pytest.approx(rate, rel=1e-3)


def test_bf16_with_fp32_accumulation_is_another_wrapper_and_does_the_same(worlds, make_case):
    """ZeRO 1 then runs DeepSpeed's BF16_Optimizer."""
    more = [("data_types", {"grad_accum_dtype": "fp32"})]
    (result,) = worlds(1)(one_update, make_case("zero1", bf16=True, more=more), 3e-3)
    for name, value in result["model_before"].items():
        assert torch.equal(result["before"]["weights"][name], value.float())
    assert largest_step(result, "projector.structure.bias") == pytest.approx(3e-3, rel=1e-3)
    moments = torch.cat([moment.flatten() for moment in result["after"]["exp_avg"].values()])
    assert float(moments.norm()) == pytest.approx(0.1 * min(1.0, result["grad_norm"]), rel=1e-3)


@pytest.mark.parametrize("zero", STAGES)
def test_a_learning_rate_of_zero_changes_nothing(worlds, make_case, zero):
    (result,) = worlds(1)(one_update, make_case(zero, "full", weight_decay=0.5), 0.0)
    assert result["grad_norm"] > 0
    assert all(largest_step(result, name) == 0 for name in result["model_before"])


@pytest.mark.parametrize("zero", STAGES)
def test_decay_acts_on_matrices_only(worlds, make_case, zero):
    """With and without decay: a matrix differs by rate * decay * weight (Loshchilov & Hutter 2019), a vector not."""
    rate, decay = 1e-2, 0.3
    (without,) = worlds(1)(one_update, make_case(zero, "full", weight_decay=0.0), rate)
    (with_decay,) = worlds(1)(one_update, make_case(zero, "full", weight_decay=decay), rate)
    for name, before in without["before"]["weights"].items():
        difference = without["after"]["weights"][name] - with_decay["after"]["weights"][name]
        wanted = rate * decay * before if before.ndim > 1 else torch.zeros_like(before)
        assert torch.allclose(difference, wanted, atol=1e-6), name


@pytest.mark.parametrize("zero", STAGES)
def test_gradients_are_clipped_to_1_unless_the_json_says_otherwise(worlds, make_case, zero):
    """The first moment after one step is (1 - beta1) times the gradient as clipped; the norm reported is before."""
    for more, bound in ((), 1.0), ((("gradient_clipping", 0.01),), 0.01):
        (result,) = worlds(1)(one_update, make_case(zero, "full", more=more), 1e-3)
        moments = torch.cat([moment.flatten() for moment in result["after"]["exp_avg"].values()])
        assert result["gradient_clipping"] == bound
        assert result["grad_norm"] > 1
        assert float(moments.norm()) == pytest.approx((1 - 0.9) * bound, rel=1e-4)
