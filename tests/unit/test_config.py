"""Recipes and the command line: what is accepted, and what each refusal says."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from proteingpt.config import (
    DEEPSPEED_KEYS,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    RunConfig,
    StageConfig,
    differences,
    from_dict,
    make_parser,
    parse_command,
    read_ds_config,
    read_recipe,
    recipe_names,
    save_recipe,
)

STAGE = {
    "template": "paper", "epochs": 2, "samples_per_step": 4, "questions_per_group": 2, "max_answer_tokens": 8,
    "warmup_steps": 1, "warmup_lr": 0.0, "init_lr": 0.001, "min_lr": 0.0, "betas": [0.9, 0.98], "weight_decay": 0.05,
}  # fmt: skip
REPOSITORY = Path(__file__).parents[2]
ZERO2 = str(REPOSITORY / "ds_configs" / "zero2.json")
NAMES = ["demo", "fast-align", "fast-instruct", "paper-align", "paper-instruct", "released-align", "released-instruct"]


def run_values(**align) -> dict:
    return {"recipe": "mine", "model": {"train": "projector"}, "align": {**STAGE, **align}}


def message(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args, **kwargs)
    return str(error.value)


def refusal(**align) -> str:
    return message(from_dict, RunConfig, run_values(**align))


def command(*arguments: str, recipe: str = "demo", ds_config: str = ZERO2) -> RunConfig:
    return parse_command(["--ds_config", ds_config, "--recipe", recipe, *arguments]).config


def leaves(kind=RunConfig, path: str = ""):
    """(path, dataclass field) of every leaf below a config class."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        inside = [t for t in (hints[f.name], *typing.get_args(hints[f.name])) if dataclasses.is_dataclass(t)]
        if inside:
            yield from leaves(inside[0], f"{path}{f.name}.")
        else:
            yield path + f.name, f


# ------------------------------------------------------------------------------------------------ what trains


def model_refusal(**model) -> str:
    values = run_values()
    values["model"] |= model
    return message(from_dict, RunConfig, values)


def test_adapters_are_settings_and_need_train_lora():
    lora = command("--model.train", "lora", "--model.lora.rank", "8", "--model.lora.targets", "[q_proj, v_proj]").model.lora
    assert (lora.rank, lora.targets, lora.dropout, lora.merge_on_export) == (8, ("q_proj", "v_proj"), 0.0, False)
    assert command("--model.train", "lora", "--model.lora.targets", "null").model.lora.targets is None
    assert "expected unset with train: projector" in model_refusal(lora={"rank": 8})
    assert "model.llm_8bit is True, expected false with train: full" in model_refusal(train="full", llm_8bit=True)
    for wrong, path in (({"rank": 0}, "rank"), ({"alpha": 0}, "alpha"), ({"dropout": 1}, "dropout"), ({"targets": []}, "targets")):
        assert model_refusal(train="lora", lora=wrong).startswith(f"model.lora.{path} is ")
    assert "model.lora.targets is 'q_proj', expected a list of strs" in model_refusal(train="lora", lora={"targets": "q_proj"})


def test_a_projector_has_the_settings_of_its_kind_and_no_other():
    for good in (
        {"projector": "mlp"}, {"projector": "mlp", "projector_width": 64}, {"projector": "resampler", "projector_tokens": 32}
    ):  # fmt: skip
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


# ------------------------------------------------------------------------------------------------ single settings


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


# ------------------------------------------------------------------------------------------------ recipes on disk


def test_these_recipes_are_there():
    assert recipe_names() == NAMES


# By hand from the table of the paper and of its published code. Batch 1 on each of four GPUs.
PUBLISHED = {
    "paper-align": dict(
        template="paper", epochs=10, samples_per_step=4, questions_per_group=1, max_answer_tokens=384,
        warmup_steps=2048, warmup_lr=1e-6, init_lr=1e-4, min_lr=8e-5, betas=(0.9, 0.98), weight_decay=0.05,
    ),
    "paper-instruct": dict(
        template="paper", epochs=10, samples_per_step=4, questions_per_group=1, warmup_steps=200, warmup_lr=1e-6,
        init_lr=1e-5, min_lr=1e-6, betas=(0.9, 0.98), weight_decay=0.05,
    ),
    "released-align": dict(
        template="released", epochs=3, samples_per_step=4, questions_per_group=1, max_answer_tokens=384,
        warmup_steps=5000, warmup_lr=1e-6, init_lr=1e-4, min_lr=8e-5, betas=(0.9, 0.999), weight_decay=0.05,
        cosine_from="start",
    ),
    "released-instruct": dict(
        template="released", epochs=10, samples_per_step=4, questions_per_group=1, max_answer_tokens=256,
        warmup_steps=5000, warmup_lr=1e-6, init_lr=1e-5, min_lr=1e-6, betas=(0.9, 0.999), weight_decay=0.05,
        cosine_from="start",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_carry_the_published_figures(name):
    config = from_dict(RunConfig, read_recipe(name))
    stage = name.split("-")[1]
    assert list(config.stages) == [stage]
    carried = vars(config.stages[stage])
    assert {key: carried[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert carried["max_steps"] is None
    assert (config.encoders.esm2, config.encoders.esm_if1) == ("esm2_t36_3B_UR50D", "esm_if1_gvp4_t16_142M_UR50")
    assert config.seed == 42


# By hand from the paper's table: its learning rates, epochs and optimizer; the batches are this project's.
FAST = {
    "fast-align": dict(
        template="paper", epochs=10, samples_per_step=None, tokens_per_step=131_072, tokens_per_pack=8192,
        questions_per_group=1, max_answer_tokens=384, warmup_lr=1e-6, init_lr=1e-4, min_lr=8e-5, betas=(0.9, 0.98),
        weight_decay=0.05,
    ),
    "fast-instruct": dict(
        template="paper", epochs=10, samples_per_step=None, tokens_per_step=131_072, tokens_per_pack=8192,
        questions_per_group=30, warmup_lr=1e-6, init_lr=1e-5, min_lr=1e-6, betas=(0.9, 0.98), weight_decay=0.05,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_fast_recipes_are_the_papers_but_for_their_batches(name):
    config = from_dict(RunConfig, read_recipe(name))
    stage = name.split("-")[1]
    assert list(config.stages) == [stage]
    carried = vars(config.stages[stage])
    assert {key: carried[key] for key in FAST[name]} == FAST[name]
    paper = vars(from_dict(RunConfig, read_recipe(f"paper-{stage}")).stages[stage])
    differing = {key for key in carried if carried[key] != paper[key]}
    assert differing <= {
        "samples_per_step", "tokens_per_step", "tokens_per_pack", "questions_per_group", "max_answer_tokens",
        "warmup_steps",
    }  # fmt: skip
    assert config.devices.balance == "measured"


def test_what_trains_in_the_published_recipes():
    """The code trains the projector in both stages, the paper speaks of tuning the LLM in its second."""
    trains = {name: read_recipe(name)["model"]["train"] for name in PUBLISHED}
    assert trains == {
        "paper-align": "projector", "paper-instruct": "full",
        "released-align": "projector", "released-instruct": "projector",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["paper", "released", "fast"])
def test_stage_2_starts_from_where_stage_1_leaves_its_model(family):
    first = parse_command(["--ds_config", ZERO2, "--recipe", f"{family}-align"]).output
    assert read_recipe(f"{family}-instruct")["model"]["init_from"] == str(first / "model")


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_recipe_reads_back_as_the_same_run(name, tmp_path):
    config = from_dict(RunConfig, read_recipe(name))
    save_recipe(config, tmp_path / "recipe.yaml")
    again = from_dict(RunConfig, read_recipe(str(tmp_path / "recipe.yaml")))
    assert again == config and differences(config, again) == []
    assert again.recipe == name  # that it began as, not the file's name


numbers = st.floats(0, 1, allow_nan=False)
plain_words = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_./ :#[]{}'\"", min_size=1, max_size=12)
OVERRIDES = {
    "seed": st.integers(0, 2**40),
    "model.llm": st.none() | plain_words.filter(lambda word: word != "null" and not word.startswith("-")),
    "model.train": st.sampled_from(["projector", "full"]),
    "model.activation_checkpointing": st.booleans(),
    "encoders.weights_dir": plain_words.filter(lambda word: word != "null" and not word.startswith("-")),
    "data.max_residues": st.none() | st.integers(1, 10**6),
    "align.epochs": st.integers(1, 1000),
    "align.max_steps": st.none() | st.integers(1, 10**9),
    "align.init_lr": st.floats(0.002, 1e6),
    "align.weight_decay": st.floats(0, 1e300),
    "align.betas": st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    "align.questions_per_protein": st.none() | st.integers(1, 10**6),
    "align.tokens_per_pack": st.none() | st.integers(1, 10**6),
    "data.shards_per_window": st.none() | st.integers(1, 10**6),
    "devices.balance": st.sampled_from(["measured", "fixed", "equal"]),
    "devices.exchange_every_steps": st.integers(1, 10**6),
    "devices.tokens_per_forward": st.none() | st.integers(1, 10**6),
    "evaluation.every_steps": st.none() | st.integers(1, 10**9),
}


def as_typed(value) -> str:
    """What a user types for a plain value."""
    if value is None:
        return "null"
    if isinstance(value, (bool, tuple)):
        return json.dumps(value)
    return str(value)


@settings(max_examples=100)
@given(st.fixed_dictionaries({}, optional=OVERRIDES))
def test_overrides_change_what_they_name_and_nothing_else_and_are_saved(tmp_path_factory, overrides):
    arguments = [word for path, value in overrides.items() for word in (f"--{path}", as_typed(value))]
    plain, config = command(), command(*arguments)
    for path, _ in leaves():
        before, after = plain, config
        for name in path.split("."):
            before, after = getattr(before, name), getattr(after, name)
        assert after == overrides.get(path, before), path
    path = tmp_path_factory.mktemp("saved") / "recipe.yaml"
    save_recipe(config, path)
    assert from_dict(RunConfig, read_recipe(str(path))) == config


def test_differences_name_each_setting_that_differs_and_sections_that_are_gone():
    before = command()
    after = command("--align.init_lr", "0.5", "--seed", "7")
    assert differences(before, after) == ["align.init_lr: was 0.002, is 0.5", "seed: was 42, is 7"]
    without = dataclasses.replace(before, demo=None)
    assert "demo.num_proteins: was 600, is None" in differences(before, without)


def test_who_computes_what_makes_no_other_run():
    """So a run may go on with other devices: but every field outside that section counts."""
    before = command()
    after = command(
        "--devices.balance", "equal", "--devices.exchange_every_steps", "7", "--devices.tokens_per_forward", "9999"
    )
    assert before != after and differences(before, after) == []
    assert differences(before, command("--data.shards_per_window", "3", "--devices.balance", "fixed")) == [
        "data.shards_per_window: was None, is 3"
    ]


def test_a_recipe_that_is_not_there_is_answered_with_those_that_are():
    said = message(read_recipe, "papr-align")
    assert "'papr-align'" in said and ", ".join(NAMES) in said
    assert "elsewhere.yaml" in message(read_recipe, "elsewhere.yaml")


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe", b"just words", b"- 1\n- 2", b""])
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert str(path) in message(read_recipe, str(path))


def test_a_recipe_of_the_users_own_is_named_after_its_file(tmp_path):
    values = run_values()
    del values["recipe"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    made = parse_command(["--ds_config", ZERO2, "--recipe", str(tmp_path / "mine.yaml")])
    assert made.config.recipe == "mine" and made.output == Path("runs/mine")


# ------------------------------------------------------------------------------------------------- DeepSpeed JSON


def json_file(directory: Path, text: str) -> str:
    (directory / "ds.json").write_text(text)
    return str(directory / "ds.json")


@pytest.mark.parametrize(
    "key, owner",
    [
        ("train_batch_size", "samples_per_step"),
        ("train_micro_batch_size_per_gpu", "samples_per_step"),
        ("gradient_accumulation_steps", "samples_per_step"),
        ("optimizer", "align.init_lr"),
        ("scheduler", "align.warmup_steps"),
    ],
)
def test_a_fact_in_both_places_is_refused_by_naming_both(tmp_path, key, owner):
    path = json_file(tmp_path, json.dumps({key: 1}))
    said = message(read_ds_config, path)
    assert key in said and path in said and owner in said and "recipe" in said


def test_auto_is_refused_at_any_depth_by_its_path(tmp_path):
    path = json_file(tmp_path, '{"zero_optimization": {"stage": 2, "offload_param": {"device": "auto"}}}')
    assert message(read_ds_config, path).startswith(f"zero_optimization.offload_param.device in {path} is 'auto'")
    assert "gradient_clipping in" in message(read_ds_config, json_file(tmp_path, '{"gradient_clipping": "auto"}'))


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", '"text"'])
def test_what_is_no_json_object_is_refused_by_name(tmp_path, text):
    path = json_file(tmp_path, text)
    assert path in message(read_ds_config, path)


def test_a_ds_config_that_is_no_file_is_answered_with_where_the_ready_ones_are(tmp_path):
    assert "ds_configs/" in message(read_ds_config, str(tmp_path / "none.json"))
    assert str(tmp_path) in message(read_ds_config, str(tmp_path))


def test_every_ready_ds_config_passes():
    paths = sorted((REPOSITORY / "ds_configs").glob("*.json"))
    assert [p.stem for p in paths] == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zeropp"]
    for path in paths:
        values = read_ds_config(str(path))
        assert values["zero_optimization"]["stage"] == (3 if path.stem == "zeropp" else int(re.search(r"\d", path.stem)[0]))
        assert ("offload_optimizer" in values["zero_optimization"]) == ("offload" in path.stem)


# --------------------------------------------------------------------------------------------------- command line


def test_the_bare_command_is_the_demo():
    made = parse_command(["--ds_config", ZERO2])
    assert made.config == from_dict(RunConfig, read_recipe("demo"))
    assert made.output == Path("runs/demo")
    assert made.ds_config == json.loads(Path(ZERO2).read_text())


def test_the_short_forms_are_the_long_ones():
    short = command("--data", "some/shards", "--llm", "some/llm", recipe="paper-align")
    assert short == command("--data.shards", "some/shards", "--model.llm", "some/llm", recipe="paper-align")
    assert (short.data.shards, short.model.llm) == ("some/shards", "some/llm")


@pytest.mark.parametrize("short, long", [("--data", "--data.shards"), ("--llm", "--model.llm")])
def test_a_short_form_beside_its_long_one_is_refused_by_naming_both(short, long):
    said = message(command, short, "a", long, "b")
    assert f"{short} and {long}" in said


def test_an_override_of_a_section_that_the_recipe_has_not_names_both():
    assert message(command, "--align.epochs", "3", recipe="paper-instruct") == (
        "--align.epochs: recipe paper-instruct has no section align"
    )
    assert "no section demo" in message(command, "--demo.num_proteins", "30", recipe="paper-align")


def test_an_override_of_a_section_left_at_its_defaults_makes_it():
    assert "checkpoint" not in read_recipe("paper-align")
    assert command("--checkpoint.keep_last", "5", recipe="paper-align").checkpoint.keep_last == 5


def test_overrides_are_checked_as_the_recipe_is():
    assert message(command, "--align.epochs", "many") == "align.epochs is 'many', expected int"
    assert message(command, "--model.train", "some").endswith("expected one of projector, lora, full")
    assert command("--align.init_lr", "3e-3").align.init_lr == 0.003
    assert command("--align.betas", "[0.5, 0.75]").align.betas == (0.5, 0.75)
    assert command("--align.max_steps", "null").align.max_steps is None


@pytest.mark.parametrize("path, text", [("align.betas", "[0.9, 0.98"), ("align.epochs", "{"), ("seed", "'1")])
def test_an_override_that_is_no_value_is_refused_with_what_was_typed(path, text):
    said = message(command, f"--{path}", text)
    assert said.startswith(f"--{path} is {text!r}, expected ")


@pytest.mark.parametrize("name", ["2024", "1e3", "no", "a: b", "[x", "~/shards"])
def test_a_path_stays_as_typed_even_where_yaml_would_read_something_else(name):
    assert command("--data.shards", name).data.shards == name
    assert command("--data", name).data.shards == name


@pytest.mark.parametrize("section", ["null", "3", "[1]"])
def test_an_override_inside_a_section_that_is_none_names_the_section(tmp_path, section):
    text = yaml.safe_dump(run_values()) + f"evaluation: {section}\n"
    (tmp_path / "mine.yaml").write_text(text)
    said = message(command, "--evaluation.num_texts", "1", recipe=str(tmp_path / "mine.yaml"))
    assert said.startswith("evaluation is ") and "expected a section" in said


@pytest.mark.parametrize("option", ["--align.epoch", "--dat", "--recipe_", "--align"])
def test_options_are_never_guessed(option):
    with pytest.raises(ConfigError, match=f"^{option} is not an option; "):
        command(option, "3")


def test_the_deepspeed_launcher_may_add_its_local_rank():
    assert parse_command(["--local_rank=3", "--ds_config", ZERO2]).config == command()


def test_help_names_every_field_with_its_sentence():
    shown = re.sub(r"\s", "", make_parser().format_help())  # argparse breaks lines, also behind hyphens
    checked = 0
    for path, f in leaves():
        if path != "recipe":
            assert f"--{path}" in shown, path
            assert re.sub(r"\s", "", f.metadata["help"]) in shown, path
            checked += 1
    assert checked > 40
    for name in NAMES:
        assert name in shown


def test_configs_cannot_be_changed_behind_their_checks():
    for cls in (RunConfig, StageConfig, EvaluationConfig):
        assert cls.__dataclass_params__.frozen


# ------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize(
    "words, shards, mixture",
    [
        (["shards/pdb"], "shards/pdb", None),
        (["a=2", "b=0.5"], None, {"a": 2.0, "b": 0.5}),
        (["a", "b=0.5"], None, {"a": 1.0, "b": 0.5}),
        (["s3://bucket/x=y/z"], "s3://bucket/x=y/z", None),
        (["x=y=3"], None, {"x=y": 3.0}),
    ],
)
def test_data_on_the_command_line_is_one_directory_or_several_with_weights(words, shards, mixture):
    argv = ["--ds_config", ZERO2, "--recipe", "fast-align", "--data", *words, "--llm", "somewhere"]
    data = parse_command(argv).config.data
    assert (data.shards, data.mixture) == (shards, mixture)


@pytest.mark.parametrize("words, said", [(["a", "a=2"], "given twice"), (["=2"], "expected DIR"), (["a=-1", "b"], "> 0")])
def test_weights_that_mean_nothing_are_refused(words, said):
    assert said in message(parse_command, ["--ds_config", ZERO2, "--recipe", "fast-align", "--data", *words])


def test_data_and_the_setting_it_is_short_for_are_not_given_together():
    argv = ["--ds_config", ZERO2, "--recipe", "fast-align", "--data", "a", "--data.mixture", "{b: 1}"]
    assert message(parse_command, argv) == "--data and --data.mixture are the same setting: give one of them"


@pytest.mark.parametrize("value", [["a"], {"a": "much"}, {1: 1.0}, "a"])
def test_a_mixture_that_is_none_is_refused_by_its_path(value):
    assert message(from_dict, DataConfig, {"mixture": value}, "data").startswith("data.mixture")


def test_a_mixture_is_saved_and_read_back(tmp_path):
    config = from_dict(RunConfig, {**run_values(), "data": {"mixture": {"a": 2, "b/c": 0.5}}})
    save_recipe(config, tmp_path / "recipe.yaml")
    again = from_dict(RunConfig, read_recipe(str(tmp_path / "recipe.yaml")))
    assert again.data.mixture == {"a": 2.0, "b/c": 0.5} == config.data.mixture


# ---------------------------------------------------------------------------------- what is ignored, kept or permitted


def test_a_key_that_deepspeed_would_ignore_is_refused_with_its_nearest(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_cliping": 1.0}))
    with pytest.raises(ConfigError, match="gradient_cliping in .* did you mean gradient_clipping?"):
        read_ds_config(str(path))
    path.write_text(json.dumps({"zzz": 1}))
    with pytest.raises(ConfigError, match="zzz in .* is no key of DeepSpeed's JSON"):
        read_ds_config(str(path))


def test_deepspeeds_keys_are_those_that_its_source_knows():
    """Each is a string of the installed source; and what the source reads by name at the top is among them."""
    import importlib.util

    root = Path(importlib.util.find_spec("deepspeed").origin).parent
    names = ("runtime", "monitor", "profiling", "comm", "autotuning", "nebula", "compression", "utils", "module_inject", "")
    text = "\n".join(path.read_text() for name in names for path in (root / name).rglob("*.py") if "legacy" not in str(path))
    assert not [key for key in DEEPSPEED_KEYS if f'"{key}"' not in text and f"'{key}'" not in text]


def test_what_differs_may_be_permitted_by_name():
    before = from_dict(RunConfig, read_recipe("demo"))
    after = dataclasses.replace(before, seed=7, checkpoint=dataclasses.replace(before.checkpoint, keep_last=9))
    assert differences(before, after) == ["seed: was 42, is 7"]
    assert differences(before, after, allowed=("seed",)) == []


def test_a_recipe_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("before")
    (tmp_path / ".recipe.yaml.partial").mkdir()  # the new one cannot be written
    with pytest.raises(OSError):
        save_recipe(from_dict(RunConfig, read_recipe("demo")), path)
    assert path.read_text() == "before"


@pytest.mark.parametrize("text", ["[" * 20_000, "\x00"])
def test_a_recipe_that_no_parser_survives_is_refused(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="mine"):
        from_dict(RunConfig, read_recipe(str(path)))
