"""Recipes on disk: YAML files, read by name or path, saved with a run whole or not at all, and compared."""

import dataclasses
import json
import os
from pathlib import Path

import yaml

from proteingpt.config.addresses import without_secrets
from proteingpt.config.settings import RunConfig
from proteingpt.config.typed import ConfigError, join

RECIPES_DIR = Path(__file__).parents[1] / "recipes"

# Settings of `data` that say how it comes here, not what is learned.
HOW_DATA_COMES = tuple(
    f"data.{name}" for name in ("embeddings", "cache_dir", "cache_gib", "read_timeout_seconds", "max_bad_share")
)


def recipe_names() -> list[str]:
    return sorted(p.stem for p in RECIPES_DIR.glob("*.yaml"))


def read_recipe(name_or_path: str) -> dict:
    """The plain values of a recipe: a name in proteingpt/recipes, or the path of a YAML file."""
    is_name = not name_or_path.endswith((".yaml", ".yml"))
    path = RECIPES_DIR / f"{name_or_path}.yaml" if is_name else Path(name_or_path)
    if not path.is_file():
        known = ", ".join(recipe_names())
        raise ConfigError(f"no recipe {name_or_path!r}: give one of {known}, or the path of a .yaml file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not readable YAML: nested too deeply") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected the sections of a recipe")
    return {"recipe": path.stem, **values}


def save_recipe(config: RunConfig, path: Path):
    # tuples become lists, which YAML reads back
    values = without_secrets(json.loads(json.dumps(dataclasses.asdict(config))))
    replace_text(path, yaml.safe_dump(values, sort_keys=False))


def replace_text(path: Path, text: str):
    """Put `text` at `path` so that a reader sees the old or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def flatten(config, path: str = "") -> dict:
    """{path: value} of every setting, for comparing two recipes."""
    flat = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, join(path, f.name)))
        else:
            flat[join(path, f.name)] = value
    return flat


def differences(before: RunConfig, after: RunConfig, allowed: tuple[str, ...] = ()) -> list[str]:
    """One line for each setting in which two recipes differ, but for who computes what, when, and what is kept."""

    def compared(path: str) -> bool:
        return not path.startswith(("devices.", "checkpoint.")) and path not in (*HOW_DATA_COMES, "track")

    # A signature is renewed from day to day, and no recipe holds it.
    old, new = ({k: without_secrets(v) for k, v in flatten(c).items() if compared(k)} for c in (before, after))
    return [
        f"{path}: was {old.get(path)!r}, is {new.get(path)!r}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and path not in allowed
    ]
