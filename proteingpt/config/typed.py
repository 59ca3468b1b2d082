"""Typed settings: a dataclass from plain values, and errors that name a setting's path, its value and what is expected.

A setting is checked where it is born: its type here, its range in `__post_init__` of the class that has it.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import field
from typing import Literal

from proteingpt.config.addresses import without_secrets

# What people look for in a recipe and find in the DeepSpeed JSON.
JSON_OWNS = ("zero_optimization", "zero_stage", "stage", "precision", "bf16", "fp16", "gradient_clipping", "offload")


class ConfigError(ValueError):
    """A setting the user gave is wrong. The message names its path, its value and what was expected; secrets of
    addresses are left out of it."""

    def __init__(self, message: str):
        super().__init__(without_secrets(message))


def require(condition: bool, name: str, value, expected: str):
    if not condition:
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


def setting(help: str, **kwargs):
    """A dataclass field with the sentence that --help shows for it."""
    return field(metadata={"help": help}, **kwargs)


def from_dict(cls, values, path: str = ""):
    """Build the config class `cls` from plain YAML values. ConfigError names the path of what does not fit."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the recipe'} is {values!r}, expected a section with the fields of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(unknown_field(join(path, str(name)), fields))
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        meant = fields[missing[0]].metadata["help"]
        raise ConfigError(f"{join(path, missing[0])} is not set, and has no default: {meant}")
    hints = typing.get_type_hints(cls)
    converted = {name: convert(hints[name], value, join(path, name)) for name, value in values.items()}
    try:
        return cls(**converted)
    except ConfigError as error:
        raise ConfigError(join(path, str(error))) from None


def unknown_field(path: str, fields) -> str:
    name = path.rpartition(".")[2]
    if name in JSON_OWNS:
        return f"{path} is not a recipe field: how a run is executed belongs in the DeepSpeed JSON (--ds_config)"
    close = difflib.get_close_matches(name, fields, n=1)
    hint = f"did you mean {join(path.rpartition('.')[0], close[0])}?" if close else f"known here: {', '.join(fields)}"
    return f"{path} is not a recipe field; {hint}"


def convert(kind, value, path: str):
    """`value` as the annotated type `kind`, or ConfigError. Integers serve as floats; 1e-4, a string in YAML, too."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        words = [word for a in args if typing.get_origin(a) is Literal for word in typing.get_args(a)]
        if value is None or value in words:
            return value
        other = next(a for a in args if a is not type(None))
        if words and typing.get_origin(other) is not Literal:
            require(type(value) is other, path, value, " or ".join([f"an {other.__name__}", *words]))
        return convert(other, value, path)
    if origin is Literal:
        require(value in args, path, value, "one of " + ", ".join(args))
        return value
    if origin is tuple and args[-1] is Ellipsis:
        require(isinstance(value, (list, tuple)), path, value, f"a list of {args[0].__name__}s")
        return tuple(convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is tuple:
        right = isinstance(value, (list, tuple)) and len(value) == len(args)
        require(right, path, value, f"a list of {len(args)} {args[0].__name__}s")
        return tuple(convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    if origin is dict:
        right = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        require(right, path, value, f"{{name: {args[1].__name__}, ...}}")
        return {key: convert(args[1], v, f"{path}[{key!r}]") for key, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, path)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        require(math.isfinite(number), path, value, "a finite number")
        return number
    elif kind in (int, bool) and type(value) is kind or kind is str and isinstance(value, str):
        return value
    raise ConfigError(f"{path} is {value!r}, expected {kind.__name__}")


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def type_name(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return "|".join(type_name(a) for a in typing.get_args(kind) if a is not type(None))
    return getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
