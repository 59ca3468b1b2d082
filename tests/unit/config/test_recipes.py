"""Recipes on disk: what the ready ones say, that what is saved is what was run, and in what two runs differ."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_values import NAMES, ZERO2, command, leaves, message, run_values

from proteingpt.config import (
    ConfigError,
    RunConfig,
    differences,
    from_dict,
    parse_command,
    read_recipe,
    recipe_names,
    save_recipe,
)


def test_a_signature_is_in_no_saved_recipe_and_another_one_is_no_other_recipe(tmp_path):
    given = [command("--data", f"https://host/shards?signature={word}") for word in ("s3cret", "renewed")]
    save_recipe(given[0], tmp_path / "recipe.yaml")
    assert "s3cret" not in (tmp_path / "recipe.yaml").read_text()
    saved = from_dict(RunConfig, read_recipe(str(tmp_path / "recipe.yaml")))
    assert saved.data.shards == "https://host/shards"
    assert differences(saved, given[0]) == differences(*given) == []
    elsewhere = command("--data", "https://host/others?signature=s3cret")
    assert differences(saved, elsewhere) == ["data.shards: was 'https://host/shards', is 'https://host/others'"]


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
        template="paper", epochs=10, samples_per_step=None, tokens_per_step=131_072, tokens_per_pack=4096,
        questions_per_group=1, max_answer_tokens=384, warmup_lr=1e-6, init_lr=1e-4, min_lr=8e-5, betas=(0.9, 0.98),
        weight_decay=0.05,
    ),
    "fast-instruct": dict(
        template="paper", epochs=10, samples_per_step=None, tokens_per_step=131_072, tokens_per_pack=4096,
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
    # The longest protein, both encoders' rows and their ends, and a description of full length leave 200 tokens of a
    # pack.
    assert 2 * (config.data.max_residues + 2) + 384 + 200 <= carried["tokens_per_pack"]


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


def test_a_mixture_is_saved_and_read_back(tmp_path):
    config = from_dict(RunConfig, {**run_values(), "data": {"mixture": {"a": 2, "b/c": 0.5}}})
    save_recipe(config, tmp_path / "recipe.yaml")
    again = from_dict(RunConfig, read_recipe(str(tmp_path / "recipe.yaml")))
    assert again.data.mixture == {"a": 2.0, "b/c": 0.5} == config.data.mixture


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
