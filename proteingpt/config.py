"""What is learned: a recipe, as typed dataclasses filled from YAML and from the command line.

Each fact has one home: the recipe says what is learned (model, data, schedule, batch), the DeepSpeed JSON says how it
runs (ZeRO stage, offload, precision, clipping). A setting is checked where it is born, and its error names its path,
its value and what was expected. The resolved recipe is saved with the run and can be run again.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

RECIPES_DIR = Path(__file__).parent / "recipes"
STAGES = ("align", "instruct")

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
# The reverse: what people look for in a recipe and find in the JSON.
JSON_OWNS = ("zero_optimization", "zero_stage", "stage", "precision", "bf16", "fp16", "gradient_clipping", "offload")


# In the place of an encoder's weights: the prompt then has no rows of it.
NO_ENCODER = "none"


# Settings of `data` that say how it comes here, not what is learned.
HOW_DATA_COMES = tuple(f"data.{name}" for name in ("embeddings", "cache_dir", "cache_gib", "read_timeout_seconds", "max_bad_share"))


# What a checkpoint notes the fingerprints of, beside the recipe (training/identity.py).
IDENTITY = ("data", "tokenizer", "llm", "esm2", "esm_if1")


class ConfigError(ValueError):
    """A setting the user gave is wrong. The message names its path, its value and what was expected."""


def require(condition: bool, name: str, value, expected: str):
    if not condition:
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


def setting(help: str, **kwargs):
    """A dataclass field with the sentence that --help shows for it."""
    return field(metadata={"help": help}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = setting("rank of each adapter", default=16)
    alpha: float = setting("what an adapter gives is scaled by alpha / rank", default=32.0)
    dropout: float = setting(
        "share of an adapter's inputs that is dropped; above 0 losses depend on who computes what", default=0.0
    )
    targets: tuple[str, ...] | None = setting(
        "names of the linear layers that get one, [q_proj, v_proj]; null: all of attention and MLP", default=None
    )
    merge_on_export: bool = setting("export the LLM with its adapters added in, whole, rather than beside it", default=False)

    def __post_init__(self):
        require(self.rank > 0, "rank", self.rank, "> 0")
        require(self.alpha > 0, "alpha", self.alpha, "> 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(self.targets is None or len(self.targets) > 0, "targets", self.targets, "one name at least, or null")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    llm: str | None = setting("directory of a causal LM in Hugging Face format", default=None)
    train: Literal["projector", "lora", "full"] = setting(
        "what trains: the projections alone, adapters in the LLM as well (LoRA), or all of the LLM"
    )
    lora: LoraConfig = setting("the adapters, with train: lora", default=LoraConfig())
    llm_8bit: bool = setting(
        "hold the frozen LLM in 8 bits (by bitsandbytes), in half the memory of bf16 and not quite the same", default=False
    )
    projector: Literal["linear", "mlp", "resampler"] = setting(
        "of each encoder's rows: a linear map, as published; two layers with a GELU between; or learned queries that "
        "attend to them, which give the same number of tokens for every protein",
        default="linear",
    )
    projector_tokens: int | None = setting("tokens that a resampler makes of each encoder's rows", default=None)
    projector_width: int | None = setting("width inside an mlp or resampler; null: the LLM's", default=None)
    init_from: str | None = setting("exported model directory whose weights the first stage starts from", default=None)
    activation_checkpointing: bool = setting("recompute LLM activations in the backward pass", default=False)
    attention: Literal["auto", "flex", "sdpa"] = setting(
        "FlexAttention's compiled kernel, or torch's SDPA; auto: the kernel on GPUs", default="auto"
    )

    def __post_init__(self):
        require(self.train == "lora" or self.lora == LoraConfig(), "lora", self.lora, f"unset with train: {self.train}")
        expected = "false with train: full: only a frozen LLM can be held in 8 bits"
        require(not (self.llm_8bit and self.train == "full"), "llm_8bit", self.llm_8bit, expected)
        tokens, width = self.projector_tokens, self.projector_width
        if self.projector == "resampler":
            require(tokens is not None and tokens > 0, "projector_tokens", tokens, "> 0, with projector: resampler")
        else:
            require(tokens is None, "projector_tokens", tokens, f"null with projector: {self.projector}")
        if self.projector == "linear":
            require(width is None, "projector_width", width, "null with projector: linear, which has no inner layer")
        require(width is None or width > 0, "projector_width", width, "> 0, or null")


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    esm2: str | None = setting(
        "ESM-2: a published name, a fair-esm .pt file, a Hugging Face directory, or none", default=None
    )
    esm_if1: str | None = setting("ESM-IF1: the published name, the path of a fair-esm .pt file, or none", default=None)
    esm2_layer: int | None = setting("ESM-2's layer whose rows are used; null: the last, after its norm", default=None)
    weights_dir: str = setting("where published names are looked for first", default="weights")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("precision of the frozen encoders", default="bfloat16")
    backend: Literal["fast", "reference"] = setting("our own forward, or fair-esm's as the oracle", default="fast")

    def __post_init__(self):
        require(self.esm2_layer is None or self.esm2_layer >= 0, "esm2_layer", self.esm2_layer, ">= 0, or null")
        both = (self.esm2, self.esm_if1)
        require(both != (NO_ENCODER, NO_ENCODER), "esm2, esm_if1", both, "at least one encoder")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str | None = setting(
        "directory written by launch/build_shards.py, or its address (s3://, http://, ...)", default=None
    )
    mixture: dict[str, float] | None = setting(
        "instead of shards: {directory: weight, ...}; a protein of weight 1 is seen once in an epoch, of 2.5 two or three "
        "times, of 0.5 in every other, drawn anew each time",
        default=None,
    )
    embeddings: str | None = setting(
        "directory written by launch/cache_embeddings.py; null: encoders run with the training", default=None
    )
    max_residues: int | None = setting("longer proteins are left out, and counted in the log, or cropped", default=None)
    long_proteins: Literal["skip", "crop"] = setting(
        "those over max_residues: skip, or crop to a window drawn anew in each epoch, the middle in evaluation. Questions "
        "stay those of the whole protein, so that one about its length is answered wrong for a crop: hence skip",
        default="skip",
    )
    shards_per_window: int | None = setting(
        "shards read at a time: an epoch is shuffled within them; null: as many as hold 4 million questions", default=None
    )
    cache_dir: str = setting("where remote shards are kept, and what has been verified is remembered", default="shards/cache")
    cache_gib: float = setting("bound of what remote shards take there", default=50.0)
    read_timeout_seconds: float = setting("a file that gives nothing for so long ends the run, named", default=50.0)
    max_bad_share: float = setting("samples that cannot be read are left out, up to this share of those read", default=0.01)

    def __post_init__(self):
        for name in ("max_residues", "shards_per_window", "cache_gib", "read_timeout_seconds"):
            require(getattr(self, name) is None or getattr(self, name) > 0, name, getattr(self, name), "> 0")
        if self.mixture is not None:
            both = (self.shards, self.mixture)
            require(self.shards is None, "shards, mixture", both, "one of the two, the other null")
            require(bool(self.mixture), "mixture", self.mixture, "{directory: weight, ...}, one at least")
            for place, weight in self.mixture.items():
                require(weight > 0, f"mixture[{place!r}]", weight, "> 0: leave a set out that is not to be seen")
            require(self.embeddings is None, "embeddings", self.embeddings, "null with a mixture: cached rows are of one set")
        if self.long_proteins == "crop":
            require(self.max_residues is not None, "max_residues", None, "a length to crop to, with long_proteins: crop")
            require(self.embeddings is None, "embeddings", self.embeddings, "null with crop: cached rows are of whole proteins")
        require(0 <= self.max_bad_share <= 1, "max_bad_share", self.max_bad_share, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    template: Literal["paper", "released"] = setting("wording of the prompt: the paper's, or the released code's")
    epochs: int = setting("passes over the training split")
    max_steps: int | None = setting("end the stage (and its schedule) after so many steps", default=None)
    samples_per_step: int | None = setting("question/answer pairs in an optimizer step, over all ranks", default=None)
    tokens_per_step: int | None = setting("or: tokens in an optimizer step, over all ranks", default=None)
    tokens_per_pack: int | None = setting("bound of a pack, what a rank computes at once; null: a group", default=None)
    questions_per_group: int = setting("questions that share one reading of their protein, at most")
    questions_per_protein: int | None = setting("questions drawn of each protein, anew in each epoch", default=None)
    max_answer_tokens: int = setting("answers are cut to so many tokens, end symbol included")
    warmup_steps: int = setting("steps of linear warm-up from warmup_lr to init_lr")
    warmup_lr: float = setting("learning rate of the first step")
    init_lr: float = setting("learning rate at the end of warm-up")
    llm_lr_factor: float = setting("the LLM's learning rate (or its adapters') is so many times the projector's", default=1.0)
    min_lr: float = setting("learning rate at the end of the cosine")
    cosine_from: Literal["warmup", "start"] = setting(
        "the cosine's origin: the end of warm-up (continuous), or step 0 as in the released code", default="warmup"
    )
    betas: tuple[float, float] = setting("AdamW's moment decay rates")
    weight_decay: float = setting("AdamW's weight decay; none on biases, norms and other vectors")

    def __post_init__(self):
        for name in (
            "epochs", "samples_per_step", "tokens_per_step", "tokens_per_pack", "questions_per_group",
            "questions_per_protein", "max_answer_tokens", "max_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "> 0")
        both = (self.samples_per_step, self.tokens_per_step)
        require(both.count(None) == 1, "samples_per_step, tokens_per_step", both, "one of the two to be set")
        if self.tokens_per_step is not None:
            fits = self.tokens_per_pack is not None and self.tokens_per_pack <= self.tokens_per_step
            expected = f"set, and <= tokens_per_step ({self.tokens_per_step})"
            require(fits, "tokens_per_pack", self.tokens_per_pack, expected)
        else:
            fits = self.questions_per_group <= self.samples_per_step
            expected = f"<= samples_per_step ({self.samples_per_step}): a group is never split over two steps"
            require(fits, "questions_per_group", self.questions_per_group, expected)
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, ">= 0")
        require(
            0 <= self.min_lr <= self.init_lr,
            "min_lr",
            self.min_lr,
            f"between 0 and init_lr ({self.init_lr})",
        )
        require(self.llm_lr_factor > 0, "llm_lr_factor", self.llm_lr_factor, "> 0; a frozen LLM is model.train: projector")
        require(0 <= self.warmup_lr <= self.init_lr, "warmup_lr", self.warmup_lr, f"<= init_lr ({self.init_lr})")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every_steps: int | None = setting("evaluate each so many steps, and at a stage's end; null: only there", default=None)
    num_proteins: int = setting("held-out proteins that are asked their questions", default=64)
    questions_per_protein: int = setting("questions asked of each at most", default=30)
    max_new_tokens: int = setting("longest generated answer, in tokens", default=300)
    num_texts: int = setting("question, answer and prediction texts shown in TensorBoard", default=4)

    def __post_init__(self):
        for name in ("num_proteins", "questions_per_protein", "max_new_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(self.every_steps is None or self.every_steps > 0, "every_steps", self.every_steps, "> 0, or null")
        require(self.num_texts >= 0, "num_texts", self.num_texts, ">= 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = setting("save each so many steps, and at a stage's end", default=1000)
    keep_last: int = setting("checkpoints kept of each stage", default=2)
    keep_best: Literal["loss", "accuracy"] | None = setting(
        "also keep the best of the evaluated steps, by held-out loss or exact-match accuracy, and export it", default=None
    )

    def __post_init__(self):
        require(self.every_steps > 0, "every_steps", self.every_steps, "> 0")
        require(self.keep_last > 0, "keep_last", self.keep_last, "> 0")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Steps whose loss or gradient is not finite, or far above the usual, are skipped on all ranks."""

    spike_factor: float | None = setting(
        "a step is bad if its loss is so many times the running median; null: only if it is not finite", default=10.0
    )
    norm_factor: float | None = setting(
        "or if the norm of its gradient is; healthy runs have 7 times the median now and then", default=50.0
    )
    window: int = setting("steps that the median is taken over; judged by it once half of them are there", default=64)
    quarantine_after: int = setting("a sample in so many skipped steps has no weight from then on", default=2)
    roll_back_after: int = setting("so many skipped in a row: back to the last checkpoint, and past those steps", default=3)
    roll_backs: int = setting("so many times; after that the run ends with the reason", default=2)

    def __post_init__(self):
        for name in ("spike_factor", "norm_factor"):
            require(getattr(self, name) is None or getattr(self, name) > 1, name, getattr(self, name), "> 1, or null")
        for name in ("window", "quarantine_after", "roll_back_after"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")
        require(self.roll_backs >= 0, "roll_backs", self.roll_backs, ">= 0")


@dataclass(frozen=True, kw_only=True)
class DevicesConfig:
    """Who computes what. Nothing here changes what is learned, so a run may be resumed with other values."""

    balance: Literal["measured", "fixed", "equal"] = setting(
        "share steps out by measured speeds, by the table of devices, or equally", default="measured"
    )
    exchange_every_steps: int = setting("ranks agree on their measured speeds each so many steps", default=5)
    tokens_per_forward: int | Literal["auto"] | None = setting(
        "a rank's capacity: packs are joined into forwards of at most so many tokens; auto: measured on each rank before "
        "a stage; null: one pack a forward",
        default=None,
    )

    hang_seconds: int | None = setting(
        "a step, save or evaluated protein that takes longer ends the run, with every rank's stack; null: never",
        default=900,
    )

    def __post_init__(self):
        require(self.exchange_every_steps > 0, "exchange_every_steps", self.exchange_every_steps, "> 0")
        given = self.tokens_per_forward
        require(given in (None, "auto") or given > 0, "tokens_per_forward", given, "> 0, auto or null")
        require(self.hang_seconds is None or self.hang_seconds > 0, "hang_seconds", self.hang_seconds, "> 0, or null")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    directory: str = setting("where the demo's shards, random encoders and random LLM are made", default="shards/demo")
    num_proteins: int = setting("synthetic proteins to make")
    llm_width: int = setting("width of the random LLM")
    llm_layers: int = setting("layers of the random LLM")

    def __post_init__(self):
        require(self.num_proteins >= 10, "num_proteins", self.num_proteins, ">= 10")
        for name in ("llm_width", "llm_layers"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A stage runs if its section is there: align, then instruct."""

    recipe: str = setting("name of the recipe this began as")
    seed: int = setting("seed of the sample order and of every random initialisation", default=42)
    model: ModelConfig = setting("the language model")
    encoders: EncodersConfig = setting("the frozen protein encoders", default=EncodersConfig())
    data: DataConfig = setting("the shards", default=DataConfig())
    align: StageConfig | None = setting("stage 1: protein -> its description", default=None)
    instruct: StageConfig | None = setting("stage 2: protein + question -> answer", default=None)
    evaluation: EvaluationConfig = setting("held-out loss and answers", default=EvaluationConfig())
    checkpoint: CheckpointConfig = setting("saving", default=CheckpointConfig())
    guard: GuardConfig = setting("steps that are not as the ones before", default=GuardConfig())
    devices: DevicesConfig = setting("who computes what", default=DevicesConfig())
    demo: DemoConfig | None = setting("makes what is missing for a run on a fresh machine", default=None)

    def __post_init__(self):
        require(self.seed >= 0, "seed", self.seed, ">= 0")
        require(bool(self.stages), "align / instruct", None, "at least one of the two sections")
        for name, stage in self.stages.items():
            fits = self.model.train != "projector" or stage.llm_lr_factor == 1
            require(fits, f"{name}.llm_lr_factor", stage.llm_lr_factor, "1 with model.train: projector, which freezes the LLM")
        if self.devices.tokens_per_forward == "auto":
            for name, stage in self.stages.items():
                expected = "a number beside devices.tokens_per_forward auto: what is measured are whole packs"
                require(stage.tokens_per_pack is not None, f"{name}.tokens_per_pack", None, expected)

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages to run, in order."""
        return {name: getattr(self, name) for name in STAGES if getattr(self, name) is not None}


# ---------------------------------------------------------------------------------------------- from plain values


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
        raise ConfigError(f"{join(path, missing[0])} is not set, and has no default: {fields[missing[0]].metadata['help']}")
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


# ------------------------------------------------------------------------------------------------ recipes on disk


def recipe_names() -> list[str]:
    return sorted(p.stem for p in RECIPES_DIR.glob("*.yaml"))


def read_recipe(name_or_path: str) -> dict:
    """The plain values of a recipe: a name in proteingpt/recipes, or the path of a YAML file."""
    is_name = not name_or_path.endswith((".yaml", ".yml"))
    path = RECIPES_DIR / f"{name_or_path}.yaml" if is_name else Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"no recipe {name_or_path!r}: give one of {', '.join(recipe_names())}, or the path of a .yaml file")
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
    values = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, which YAML reads back
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
    compared = lambda path: not path.startswith(("devices.", "checkpoint.")) and path not in HOW_DATA_COMES  # noqa: E731
    old, new = ({k: v for k, v in flatten(c).items() if compared(k)} for c in (before, after))
    return [
        f"{path}: was {old.get(path)!r}, is {new.get(path)!r}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path) and path not in allowed
    ]


# -------------------------------------------------------------------------------------------------- DeepSpeed JSON


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
        require(isinstance(values.get(key, {}), dict), f"{key} in {path}", values.get(key), "an object, as in ds_configs/")
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


# ------------------------------------------------------------------------------------------------------ command line


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
        section = next((t for t in (hints[f.name], *typing.get_args(hints[f.name])) if dataclasses.is_dataclass(t)), None)
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
    parser.add_argument("--recipe", default="demo", help=f"what is learned: {', '.join(recipe_names())}, or a .yaml file")
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


def type_name(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return "|".join(type_name(a) for a in typing.get_args(kind) if a is not type(None))
    return getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)


def parse_command(argv: list[str]) -> Command:
    """The command line of launch/train.py. Raises ConfigError; argparse exits on --help and unknown options."""
    parsed, unknown = make_parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        close = difflib.get_close_matches(name, [*setting_paths(), "data", "embeddings", "llm", "output", "recipe", "ds_config"], n=1)
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
    """The settings that `--data DIR` or `--data DIR=2 DIR=0.5` stands for; a directory without a weight has weight 1. What
    stands behind a directory's last = is a weight if it is a number."""
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
