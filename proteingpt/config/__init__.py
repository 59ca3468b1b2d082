"""What is learned: a recipe, as typed dataclasses filled from YAML and from the command line.

Each fact has one home: the recipe says what is learned (model, data, schedule, batch), the DeepSpeed JSON says how it
runs (ZeRO stage, offload, precision, clipping). A setting is checked where it is born, and its error names its path,
its value and what was expected. The resolved recipe is saved with the run and can be run again.
"""

from proteingpt.config.command import Command, make_parser, parse_command
from proteingpt.config.deepspeed_json import DEEPSPEED_KEYS, read_ds_config
from proteingpt.config.recipes import differences, read_recipe, recipe_names, replace_text, save_recipe
from proteingpt.config.settings import (
    NO_ENCODER,
    CheckpointConfig,
    DataConfig,
    DemoConfig,
    DevicesConfig,
    EncodersConfig,
    EvaluationConfig,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
)
from proteingpt.config.typed import ConfigError, from_dict

__all__ = [
    "DEEPSPEED_KEYS", "NO_ENCODER", "CheckpointConfig", "Command", "ConfigError", "DataConfig",
    "DemoConfig", "DevicesConfig", "EncodersConfig", "EvaluationConfig", "GuardConfig", "LoraConfig", "ModelConfig",
    "RunConfig", "StageConfig", "differences", "from_dict", "make_parser", "parse_command", "read_ds_config",
    "read_recipe", "recipe_names", "replace_text", "save_recipe",
]  # fmt: skip
