"""Plain values of a recipe, settings made of them or of a command line, and what a refusal says."""

import dataclasses
import typing
from pathlib import Path

import pytest

from proteingpt.config import ConfigError, RunConfig, from_dict, parse_command

REPOSITORY = Path(__file__).parents[1]
ZERO2 = str(REPOSITORY / "ds_configs" / "zero2.json")
NAMES = ["demo", "fast-align", "fast-instruct", "paper-align", "paper-instruct", "released-align", "released-instruct"]
STAGE = {
    "template": "paper", "epochs": 2, "samples_per_step": 4, "questions_per_group": 2, "max_answer_tokens": 8,
    "warmup_steps": 1, "warmup_lr": 0.0, "init_lr": 0.001, "min_lr": 0.0, "betas": [0.9, 0.98], "weight_decay": 0.05,
}  # fmt: skip


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
