"""Settings: what is accepted, and what each refusal says."""

import dataclasses
import math

import pytest
import yaml
from recipe_values import STAGE, command, message, refusal, run_values

from proteingpt.config import DataConfig, EvaluationConfig, RunConfig, StageConfig, from_dict


def model_refusal(**model) -> str:
    values = run_values()
    values["model"] |= model
    return message(from_dict, RunConfig, values)


def test_adapters_are_settings_and_need_train_lora():
    words = ("--model.train", "lora", "--model.lora.rank", "8", "--model.lora.targets", "[q_proj, v_proj]")
    lora = command(*words).model.lora
    assert (lora.rank, lora.targets, lora.dropout, lora.merge_on_export) == (8, ("q_proj", "v_proj"), 0.0, False)
    assert command("--model.train", "lora", "--model.lora.targets", "null").model.lora.targets is None
    assert "expected unset with train: projector" in model_refusal(lora={"rank": 8})
    assert "model.llm_8bit is True, expected false with train: full" in model_refusal(train="full", llm_8bit=True)
    for name, wrong in {"rank": 0, "alpha": 0, "dropout": 1, "targets": []}.items():
        assert model_refusal(train="lora", lora={name: wrong}).startswith(f"model.lora.{name} is ")
    said = model_refusal(train="lora", lora={"targets": "q_proj"})
    assert "model.lora.targets is 'q_proj', expected a list of strs" in said


def test_a_projector_has_the_settings_of_its_kind_and_no_other():
    for good in (
        {"projector": "mlp"},
        {"projector": "mlp", "projector_width": 64},
        {"projector": "resampler", "projector_tokens": 32},
    ):
        values = run_values()
        values["model"] |= good
        assert from_dict(RunConfig, values).model.projector == good["projector"]
    assert "model.projector_tokens is None, expected > 0" in model_refusal(projector="resampler")
    assert "model.projector_tokens is 4, expected null" in model_refusal(projector="mlp", projector_tokens=4)
    assert "model.projector_width is 64, expected null" in model_refusal(projector_width=64)


def test_a_rate_of_the_llms_own_needs_an_llm_that_trains():
    assert command("--instruct.llm_lr_factor", "0.1").instruct.llm_lr_factor == 0.1
    assert "align.llm_lr_factor is 0.1, expected 1 with model.train: projector" in refusal(llm_lr_factor=0.1)
    assert "align.llm_lr_factor is 0.0, expected > 0" in refusal(llm_lr_factor=0.0)


def test_an_unknown_field_is_named_by_its_whole_path_with_the_nearest_one():
    assert refusal(warmup_stps=3) == "align.warmup_stps is not a recipe field; did you mean align.warmup_steps?"
    values = {**run_values(), "modle": {}}
    assert message(from_dict, RunConfig, values) == "modle is not a recipe field; did you mean model?"


def test_an_unknown_field_like_no_other_is_answered_with_those_there_are():
    said = message(from_dict, DataConfig, {"zzz": 1}, "data")
    fields = [f.name for f in dataclasses.fields(DataConfig)]
    assert said == f"data.zzz is not a recipe field; known here: {', '.join(fields)}"


@pytest.mark.parametrize("name", ["zero_optimization", "bf16", "fp16", "gradient_clipping", "offload", "precision"])
def test_what_the_deepspeed_json_owns_is_sent_there(name):
    said = message(from_dict, RunConfig, {**run_values(), name: 1})
    assert said.startswith(f"{name} ") and "--ds_config" in said
    assert f"align.{name} " in refusal(**{name: 1}) and "--ds_config" in refusal(**{name: 1})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("epochs", "three", "int"),
        ("epochs", 3.0, "int"),
        ("epochs", True, "int"),
        ("epochs", None, "int"),
        ("max_steps", "many", "int"),
        ("init_lr", "fast", "number"),
        ("init_lr", True, "float"),
        ("init_lr", [0.1], "float"),
        ("init_lr", None, "float"),
        ("init_lr", math.inf, "finite"),
        ("weight_decay", math.nan, "finite"),
        ("weight_decay", 10**400, "finite"),
        ("template", "papr", "one of paper, released"),
        ("template", None, "one of paper, released"),
        ("cosine_from", "end", "one of warmup, start"),
        ("betas", [0.9], "a list of 2 floats"),
        ("betas", [0.9, 0.98, 0.999], "a list of 2 floats"),
        ("betas", "0.9, 0.98", "a list of 2 floats"),
        ("betas", 0.9, "a list of 2 floats"),
    ],
)
def test_an_ill_typed_field_is_named_with_path_value_and_expectation(name, value, expected):
    said = refusal(**{name: value})
    assert said.startswith(f"align.{name} is {value!r}, expected ") and expected in said


def test_an_ill_typed_part_of_a_list_is_named_by_its_number():
    assert refusal(betas=[0.9, "high"]).startswith("align.betas[1] is 'high', expected ")


@pytest.mark.parametrize("section", ["model", "align", "evaluation"])
@pytest.mark.parametrize("value", [3, "text", [1]])
def test_a_section_that_is_none_says_that_a_section_was_expected(section, value):
    said = message(from_dict, RunConfig, {**run_values(), section: value})
    assert said.startswith(f"{section} is {value!r}, expected a section")


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("epochs", 0, "> 0"),
        ("samples_per_step", -1, "> 0"),
        ("max_answer_tokens", 0, "> 0"),
        ("max_steps", 0, "> 0"),
        ("warmup_steps", -1, ">= 0"),
        ("tokens_per_pack", 0, "> 0"),
        ("questions_per_protein", 0, "> 0"),
        ("questions_per_group", 0, "> 0"),
        ("questions_per_group", 5, "<= samples_per_step (4)"),
        ("min_lr", 0.01, "init_lr (0.001)"),
        ("min_lr", -0.01, "between 0 and init_lr"),
        ("warmup_lr", 0.01, "<= init_lr (0.001)"),
        ("betas", [0.9, 1.0], "[0, 1)"),
        ("weight_decay", -0.1, ">= 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limits(name, value, expected):
    said = refusal(**{name: value})
    assert said.startswith(f"align.{name} is ") and expected in said


def test_a_step_is_of_so_many_questions_or_of_so_many_tokens():
    both = "align.samples_per_step, tokens_per_step is"
    assert refusal(tokens_per_step=100, tokens_per_pack=50).startswith(f"{both} (4, 100), expected one of the two")
    assert refusal(samples_per_step=None).startswith(f"{both} (None, None), expected one of the two")
    stage = from_dict(RunConfig, run_values(samples_per_step=None, tokens_per_step=100, tokens_per_pack=100)).align
    assert (stage.samples_per_step, stage.tokens_per_step, stage.tokens_per_pack) == (None, 100, 100)
    assert refusal(samples_per_step=None, tokens_per_step=0).startswith("align.tokens_per_step is 0, expected > 0")


@pytest.mark.parametrize("tokens_per_pack", [None, 101])
def test_steps_of_tokens_are_made_of_packs_no_larger_than_they(tokens_per_pack):
    said = refusal(samples_per_step=None, tokens_per_step=100, tokens_per_pack=tokens_per_pack)
    assert said == f"align.tokens_per_pack is {tokens_per_pack}, expected set, and <= tokens_per_step (100)"


def test_a_group_may_be_larger_than_a_step_of_tokens_has_questions():
    """The bound of samples_per_step is not one of tokens."""
    stage = from_dict(
        RunConfig, run_values(samples_per_step=None, tokens_per_step=9, tokens_per_pack=9, questions_per_group=30)
    ).align
    assert stage.questions_per_group == 30


@pytest.mark.parametrize(
    "path, value",
    [
        ("devices.exchange_every_steps", 0),
        ("devices.tokens_per_forward", 0),
        ("data.shards_per_window", 0),
        ("evaluation.every_steps", 0),
        ("evaluation.num_proteins", 0),
        ("evaluation.questions_per_protein", 0),
        ("evaluation.max_new_tokens", 0),
        ("evaluation.num_texts", -1),
        ("checkpoint.every_steps", 0),
        ("checkpoint.keep_last", 0),
        ("data.max_residues", 0),
        ("demo.num_proteins", 9),
        ("demo.llm_width", 0),
        ("demo.llm_layers", 0),
        ("seed", -1),
    ],
)
def test_no_setting_that_would_fail_hours_later_is_accepted(path, value):
    """Each of these divides by zero, keeps nothing or draws from a negative seed somewhere in a run."""
    assert message(command, f"--{path}", str(value)).startswith(f"{path} is {value}, expected ")


def test_a_missing_required_field_is_named_with_what_it_means():
    values = run_values()
    del values["align"]["epochs"]
    said = message(from_dict, RunConfig, values)
    assert said == "align.epochs is not set, and has no default: passes over the training split"
    assert "model.train is not set" in message(from_dict, RunConfig, {**run_values(), "model": {}})


def test_a_recipe_without_a_stage_is_refused():
    values = run_values()
    del values["align"]
    assert "align / instruct" in message(from_dict, RunConfig, values)


def test_yaml_reads_1e_4_as_a_string_and_it_serves_as_a_number():
    written = yaml.safe_load("{init_lr: 1e-4, weight_decay: 0, betas: [9e-1, 0]}")
    assert written["init_lr"] == "1e-4"
    stage = from_dict(RunConfig, run_values(**written)).align
    assert (stage.init_lr, stage.weight_decay, stage.betas) == (0.0001, 0.0, (0.9, 0.0))
    assert type(stage.weight_decay) is float


def test_null_stands_for_none_only_where_none_is_a_value():
    assert from_dict(RunConfig, run_values(max_steps=None)).align.max_steps is None
    assert from_dict(RunConfig, {**run_values(), "instruct": None}).stages.keys() == {"align"}
    said = message(from_dict, RunConfig, {**run_values(), "model": None})
    assert said.startswith("model is None, expected a section")


def test_stages_run_in_their_order_whatever_the_order_in_the_file():
    values = {"instruct": dict(STAGE), **run_values()}
    assert list(from_dict(RunConfig, values).stages) == ["align", "instruct"]


def test_configs_cannot_be_changed_behind_their_checks():
    for cls in (RunConfig, StageConfig, EvaluationConfig):
        assert cls.__dataclass_params__.frozen


@pytest.mark.parametrize("value", [["a"], {"a": "much"}, {1: 1.0}, "a"])
def test_a_mixture_that_is_none_is_refused_by_its_path(value):
    assert message(from_dict, DataConfig, {"mixture": value}, "data").startswith("data.mixture")
