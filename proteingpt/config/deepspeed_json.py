"""The DeepSpeed JSON: how it runs. What belongs in the recipe, what DeepSpeed would ignore and "auto" are refused."""

import difflib
import json
from pathlib import Path

from proteingpt.config.typed import ConfigError, join, require

# DeepSpeed keys whose fact lives in the recipe, with the settings that own it.
RECIPE_OWNS = {
    "train_batch_size": "align.samples_per_step / instruct.samples_per_step",
    "train_micro_batch_size_per_gpu": "align.samples_per_step / instruct.samples_per_step",
    "gradient_accumulation_steps": "align.samples_per_step / instruct.samples_per_step",
    "optimizer": "align.init_lr, betas, weight_decay and those of instruct",
    "activation_checkpointing": "model.activation_checkpointing",
    "scheduler": "align.warmup_steps, init_lr, min_lr and those of instruct",
}
# What DeepSpeed 0.19 reads at the top of its JSON (runtime/config.py); the rest it ignores in silence.
DEEPSPEED_KEYS = frozenset(
    "activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type "
    "compile compression_training csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt "
    "disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps "
    "gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level "
    "managed_gradient_accumulation memory_breakdown nebula optimizer pipeline prescale_gradients scheduler "
    "seq_parallel_communication_data_type sparse_gradients steps_per_print tensor_parallel tensorboard timers "
    "torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism "
    "wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
    "zero_optimization".split()
)


def read_ds_config(path: str) -> dict:
    """The DeepSpeed JSON, checked against the one-home rule."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--ds_config {path}: {error.strerror}; ds_configs/ holds ready ones") from None
    except ValueError as error:
        raise ConfigError(f"--ds_config {path} is not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--ds_config {path} holds {type(values).__name__}, expected an object")
    for key, owner in RECIPE_OWNS.items():
        if key in values:
            raise ConfigError(f"{key} stands in {path} and its fact in the recipe ({owner}): remove it from {path}")
    for key in values:
        if key not in DEEPSPEED_KEYS:
            close = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else "DeepSpeed would ignore it in silence: remove it"
            raise ConfigError(f"{key} in {path} is no key of DeepSpeed's JSON; {hint}")
    for key in ("bf16", "fp16", "zero_optimization"):
        value = values.get(key, {})
        require(isinstance(value, dict), f"{key} in {path}", value, "an object, as in ds_configs/")
    for key, value in flatten_json(values):
        if value == "auto":
            raise ConfigError(f"{key} in {path} is 'auto', expected a value: nothing here fills it in")
    return values


def flatten_json(values: dict, path: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten_json(value, join(path, key))
        else:
            yield join(path, key), value
