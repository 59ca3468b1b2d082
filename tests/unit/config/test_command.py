"""The command line of a training: short forms, overrides, mixtures, and options that are none."""

import json
import re
from pathlib import Path

import pytest
import yaml
from recipe_values import NAMES, ZERO2, command, leaves, message, run_values

from proteingpt.config import ConfigError, RunConfig, from_dict, make_parser, parse_command, read_recipe


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


@pytest.mark.parametrize(
    "words, said", [(["a", "a=2"], "given twice"), (["=2"], "expected DIR"), (["a=-1", "b"], "> 0")]
)
def test_weights_that_mean_nothing_are_refused(words, said):
    assert said in message(parse_command, ["--ds_config", ZERO2, "--recipe", "fast-align", "--data", *words])


def test_data_and_the_setting_it_is_short_for_are_not_given_together():
    argv = ["--ds_config", ZERO2, "--recipe", "fast-align", "--data", "a", "--data.mixture", "{b: 1}"]
    assert message(parse_command, argv) == "--data and --data.mixture are the same setting: give one of them"
