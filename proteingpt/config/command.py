"""The command line of launch/train.py: a recipe, every field of which can be overridden, and a DeepSpeed JSON."""

import argparse
import dataclasses
import difflib
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from proteingpt.config.deepspeed_json import read_ds_config
from proteingpt.config.recipes import read_recipe, recipe_names
from proteingpt.config.settings import STAGES, RunConfig
from proteingpt.config.typed import ConfigError, from_dict, join, require, type_name

# What a checkpoint notes the fingerprints of, beside the recipe (training/identity.py).
IDENTITY = ("data", "tokenizer", "llm", "esm2", "esm_if1")


@dataclass(frozen=True)
class Command:
    """What `launch/train.py` was asked to do."""

    config: RunConfig
    ds_config: dict
    output: Path
    # Settings, or parts such as data and tokenizer, that may differ from those the run was begun with.
    allow_changed: tuple[str, ...] = ()


def setting_paths(cls=RunConfig, path: str = "") -> dict[str, tuple]:
    """{path: (annotated type, dataclass field)} of every setting that the command line can override."""
    paths = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kinds = (hints[f.name], *typing.get_args(hints[f.name]))
        section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if section:
            paths.update(setting_paths(section, join(path, f.name)))
        elif f.name != "recipe":
            paths[join(path, f.name)] = (hints[f.name], f)
    return paths


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/train.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train ProteinGPT. Without --recipe it runs the demo, which needs nothing but this repository.",
        epilog="Any field of the recipe can be overridden: --section.field VALUE (null for none).",
    )
    parser.add_argument("--ds_config", required=True, help="DeepSpeed JSON: how it runs (see ds_configs/)")
    known = ", ".join(recipe_names())
    parser.add_argument("--recipe", default="demo", help=f"what is learned: {known}, or a .yaml file")
    parser.add_argument(
        "--data", nargs="+", metavar="DIR",
        help="shard directory (short for --data.shards), or several, DIR=WEIGHT DIR=WEIGHT (short for --data.mixture)",
    )  # fmt: skip
    parser.add_argument("--embeddings", help="cached encoder rows (short for --data.embeddings)")
    parser.add_argument("--llm", help="directory of the language model (short for --model.llm)")
    parser.add_argument("--output", help="run directory, continued if it exists [runs/RECIPE]")
    parser.add_argument(
        "--allow-changed", action="append", default=[], metavar="FIELD",
        help="continue --output though this differs: a field of the recipe, or data, tokenizer, llm, esm2, esm_if1",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    group = parser.add_argument_group("fields of the recipe")
    for path, (kind, f) in setting_paths().items():
        group.add_argument(f"--{path}", metavar=type_name(kind), dest=path, default=None, help=f.metadata["help"])
    return parser


def parse_command(argv: list[str]) -> Command:
    """The command line of launch/train.py. Raises ConfigError; argparse exits on --help and unknown options."""
    parsed, unknown = make_parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        options = [*setting_paths(), "data", "embeddings", "llm", "output", "recipe", "ds_config"]
        close = difflib.get_close_matches(name, options, n=1)
        hint = f"did you mean --{close[0]}?" if close else "--help lists them all"
        raise ConfigError(f"{unknown[0]} is not an option; {hint}")
    args = vars(parsed)
    values = read_recipe(args["recipe"])
    overrides = {
        path: parse_override(path, kind, args[path])
        for path, (kind, _) in setting_paths().items()
        if args[path] is not None
    }
    if args["data"] is not None:
        given = [path for path in ("data.shards", "data.mixture") if path in overrides]
        if given:
            raise ConfigError(f"--data and --{given[0]} are the same setting: give one of them")
        overrides.update(parse_data(args["data"]))
    for short, path in (("embeddings", "data.embeddings"), ("llm", "model.llm")):
        if args[short] is not None:
            if path in overrides:
                raise ConfigError(f"--{short} and --{path} are the same setting: give one of them")
            overrides[path] = args[short]
    for path, value in overrides.items():
        override(values, path, value)
    config = from_dict(RunConfig, values)
    for name in args["allow_changed"]:
        known = [*setting_paths(), *IDENTITY]
        require(name in known, "--allow-changed", name, f"a field of the recipe, or one of {', '.join(IDENTITY)}")
    output = Path(args["output"] or f"runs/{config.recipe}")
    return Command(config, read_ds_config(args["ds_config"]), output, tuple(args["allow_changed"]))


def parse_data(words: list[str]) -> dict:
    """The settings that `--data DIR` or `--data DIR=2 DIR=0.5` stands for; a directory without a weight has weight 1.
    What stands behind a directory's last = is a weight if it is a number."""
    weights = {}
    for word in words:
        place, equals, text = word.rpartition("=")
        try:
            weight = float(text) if equals else None
        except ValueError:
            weight = None
        if weight is None:
            place, weight = word, 1.0
        if place in ("", *weights):
            raise ConfigError(f"--data {word}: {'given twice' if place else 'expected DIR, or DIR=WEIGHT'}")
        weights[place] = weight
    if weights == {words[0]: 1.0}:
        return {"data.shards": words[0], "data.mixture": None}
    return {"data.shards": None, "data.mixture": weights}


def parse_override(path: str, kind, text: str):
    """The plain value of `--path text`, as YAML reads it. A string stays as typed: a directory may be called 2024."""
    if str in (kind, *typing.get_args(kind)):
        return None if text == "null" else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--{path} is {text!r}, expected {type_name(kind)}") from None


def override(values: dict, path: str, value):
    *sections, name = path.split(".")
    for section in sections:
        if section in (*STAGES, "demo") and values.get(section) is None:
            raise ConfigError(f"--{path}: recipe {values['recipe']} has no section {section}")
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            return  # from_dict names it: a recipe's section that is none
    values[name] = value
