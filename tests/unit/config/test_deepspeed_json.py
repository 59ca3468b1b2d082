"""The DeepSpeed JSON: what belongs in the recipe, is ignored or is left open is refused by its name."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from recipe_values import REPOSITORY, message

from proteingpt.config import DEEPSPEED_KEYS, ConfigError, read_ds_config


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
        stage = 3 if path.stem == "zeropp" else int(re.search(r"\d", path.stem)[0])
        assert values["zero_optimization"]["stage"] == stage
        assert ("offload_optimizer" in values["zero_optimization"]) == ("offload" in path.stem)


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
    root = Path(importlib.util.find_spec("deepspeed").origin).parent
    text = "\n".join(path.read_text() for path in root.rglob("*.py") if "legacy" not in str(path))
    assert not [key for key in DEEPSPEED_KEYS if f'"{key}"' not in text and f"'{key}'" not in text]
