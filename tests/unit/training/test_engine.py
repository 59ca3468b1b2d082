"""DeepSpeed behind our class: what it is told, and that it does what it is told."""

import dataclasses

import pytest
import torch
from small_run import Case, SmallRun, zero_options
from torch import nn

from proteingpt.config import ConfigError
from proteingpt.training import engine
from proteingpt.training.engine import check_device, check_partition, parameter_groups, precision

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
    assert parameter_groups(model, 0.1) == [{"params": [model.weight], "weight_decay": 0.1, "lr_factor": 1.0}]


def test_the_llm_may_have_a_rate_of_its_own():
    model = nn.ModuleDict({"projector": nn.Linear(2, 3), "llm": nn.Linear(3, 3)})
    model["frozen"] = nn.Linear(3, 3).requires_grad_(False)
    found = [
        (g["weight_decay"], g["lr_factor"], [id(p) for p in g["params"]]) for g in parameter_groups(model, 0.1, 0.25)
    ]
    ours, theirs = model["projector"], model["llm"]
    assert found == [
        (0.1, 1.0, [id(ours.weight)]), (0.1, 0.25, [id(theirs.weight)]),
        (0.0, 1.0, [id(ours.bias)]), (0.0, 0.25, [id(theirs.bias)]),
    ]  # fmt: skip
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [2, 2]


def test_zero_plus_plus_is_what_deepspeed_knows_and_is_refused_where_there_is_no_gpu(monkeypatch):
    values = zero_options("zeropp")
    config = engine.import_deepspeed().runtime.zero.config.DeepSpeedZeroConfig(**values)
    assert config.zero_quantized_weights and config.zero_quantized_gradients and config.zero_hpz_partition_size == 8
    assert not config.model_extra, "a key that DeepSpeed does not know"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        with pytest.raises(ConfigError, match=f"{name} .* needs a GPU.*zero3.json"):
            check_device({"zero_optimization": {"stage": 3, name: True}})
    check_device({"zero_optimization": zero_options("zero3")})
    check_device({})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_device({"zero_optimization": values})


@pytest.mark.parametrize(
    "size, world_size, fits", [(1, 5, True), (8, 4, True), (8, 16, True), (8, 12, False), (3, 4, False)]
)
def test_a_node_holds_as_many_ranks_as_the_partition(size, world_size, fits):
    if fits:
        return check_partition(size, world_size)
    with pytest.raises(ConfigError, match=f"is {size}, which does not divide {world_size} ranks"):
        check_partition(size, world_size)


# -------------------------------------------------------------------------------------------------- on one rank

STAGES = ["zero0", "zero1", "zero2", "zero3"]


@pytest.fixture
def make_case(demo_assets, qwen2):
    def make(zero="zero0", train="projector", bf16=False, more=(), **stage):
        stage = tuple({"samples_per_step": 4, **stage}.items())
        return Case(str(demo_assets), str(qwen2), train, zero_options(zero), bf16, stage=stage, more=tuple(more))

    return make


def accumulate(run, engine, work) -> list[float]:
    """This rank's forwards and backwards. The norm of each one's gradient."""
    norms = []
    with engine.accumulating(work.several):
        for pack in work.packs:
            loss = engine.forward(pack, *run.encoders.encode(pack.proteins))
            norms.append(float(engine.backward(loss, work.answer_tokens, is_last=pack is work.packs[-1])))
    return norms


def one_update(rank, device, case, learning_rate: float) -> dict:
    """Master weights before and after a step, by name, the model's own afterwards, and the optimizer's count."""
    run = SmallRun(case)
    engine = run.engine()
    model_before = {name: p.clone() for name, p in run.model().named_parameters() if p.requires_grad}
    before = engine.get_state()
    work = run.work(engine, rank, 0)
    accumulate(run, engine, work)
    engine.reduce()
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


# -------------------------------------------------------------------------------------------- a step that is dropped

FP32_GRADIENTS = (("data_types", {"grad_accum_dtype": "fp32"}),)  # ZeRO 1 in bf16 then runs DeepSpeed's BF16_Optimizer


def after_drops(rank, device, case, drops) -> dict:
    """The state after a step that follows the dropped ones, its gradient's norm, and the updates counted. drops:
    whether each was reduced before."""
    run = SmallRun(case)
    engine = run.engine()
    for is_reduced in drops:
        accumulate(run, engine, run.work(engine, rank, 0))
        if is_reduced:
            engine.reduce()
        engine.drop()
        assert not any(p.grad is not None and p.grad.any() for p in engine.parameters.values())
    before = engine.get_state()
    accumulate(run, engine, run.work(engine, rank, 1))
    norm = engine.reduce()
    taken = engine.step(1e-3)
    result = {"before": before, "norm": norm, "state": engine.get_state(), "updates": engine.updates, "taken": taken}
    engine.close()
    return result


DROPPED = [
    *((zero, False, (), kept) for zero in ("zero0", "zero1", "zero2", "zero2_offload") for kept in (2**28, 0)),
    *((zero, True, (), 2**28) for zero in ("zero0", "zero2", "zero2_offload")),
    *(("zero1", True, FP32_GRADIENTS, kept_at_most) for kept_at_most in (2**28, 0)),
    *((zero, False, (), 0) for zero in ("zero3", "zero3_offload")),
]


@pytest.mark.parametrize("zero, bf16, more, kept_at_most", DROPPED)
def test_a_dropped_step_leaves_nothing_behind(worlds, make_case, zero, bf16, more, kept_at_most):
    """To the bit: the state after the next step is that of an engine which never saw the dropped ones. Where DeepSpeed
    has the gradients it has reduced them before anything can be dropped."""
    case = make_case(
        zero, "full", bf16=bf16, more=more, samples_per_step=9, questions_per_group=1, tokens_per_pack=None
    )
    case = dataclasses.replace(case, speeds=(1.0, 2.0), kept_at_most=kept_at_most)
    clean = worlds(2)(after_drops, case, ())[0]
    dropped = worlds(2)(after_drops, case, (False, True) if kept_at_most else (True, True))[0]
    assert clean["norm"] == dropped["norm"] > 0
    for name, value in clean["before"]["weights"].items():
        assert torch.equal(dropped["before"]["weights"][name], value)
    for kind, tensors in clean["state"].items():
        assert any(value.any() for value in tensors.values())
        for name, value in tensors.items():
            assert torch.equal(dropped["state"][kind][name], value), f"{kind} of {name}"
    assert dropped["updates"] == 1 and dropped["taken"]


def test_the_norm_known_before_a_step_is_the_one_that_deepspeed_finds_within_it(worlds, make_case):
    for zero in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        case = make_case(zero, "full", samples_per_step=9)
        ours, theirs = worlds(2)(both_norms, case)[0]
        assert ours == pytest.approx(theirs, rel=1e-6)


def both_norms(rank, device, case):
    run = SmallRun(case)
    engine = run.engine()
    accumulate(run, engine, run.work(engine, rank, 0))
    ours = engine.reduce()
    engine.step(1e-3)
    theirs = float(engine.deepspeed.get_global_grad_norm())
    engine.close()
    return ours, theirs


def norms_of_forwards(rank, device, case):
    run = SmallRun(case)
    engine = run.engine()
    norms = accumulate(run, engine, run.work(engine, rank, 0))
    return norms, engine.reduce()


@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_a_lone_forwards_norm_is_that_of_the_step(worlds, make_case, zero):
    ((norm,), reduced) = worlds(1)(norms_of_forwards, make_case(zero, "full", samples_per_step=4))[0]
    assert norm == pytest.approx(reduced, rel=1e-6) and norm > 0
