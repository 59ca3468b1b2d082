"""LoRA (arXiv 2106.09685) by peft: adapters inside the LLM, whose own weights stay frozen.

The adapters are put into the LLM in place, without peft's wrapper, so that everything else sees the same transformers
model, and checkpoints hold them by name as any weight. On disk they are an ordinary peft adapter directory. Given up:
peft's several adapters at once, and adapters on embeddings and head.
"""

import json
import re
import zlib
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from proteingpt.config import LoraConfig

ADAPTER = "adapter"  # its place in an exported model directory
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# A parameter of an adapter: `llm.model.layers.0.mlp.up_proj.lora_A.default.weight`; peft's files leave out its name.
NAME = re.compile(r"\.(lora_[AB])\.default\.")
SAVED = "base_model.model."  # what peft's files put before the LLM's own names


class LoraError(ValueError):
    """Adapters that do not fit the LLM, or an adapter directory that cannot serve."""


def add_adapters(llm: nn.Module, config: LoraConfig, seed: int, dtype: torch.dtype):
    """Freezes the LLM and puts trainable adapters into it, drawn from `seed`; they begin as no change at all.

    LoraError where config.targets names nothing in it, or its embeddings or head.
    """
    from peft import inject_adapter_in_model

    llm.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(peft_config(config), llm)
        except ValueError as error:
            raise LoraError(f"model.lora.targets is {config.targets}, which does not fit this LLM: {error}") from error
    for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        if hasattr(module, "base_layer"):
            raise LoraError(
                f"model.lora.targets is {config.targets}, expected layers of attention and MLP, not embeddings"
            )
    for parameter in adapters(llm).values():
        parameter.data = parameter.data.to(dtype)


def peft_config(config: LoraConfig, llm: str | None = None):
    """llm: the directory of the base model, as an adapter directory names it."""
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=list(config.targets) if config.targets else "all-linear", base_model_name_or_path=llm,
    )  # fmt: skip


def adapters(llm: nn.Module) -> dict[str, nn.Parameter]:
    """By name in the LLM."""
    return {name: parameter for name, parameter in llm.named_parameters() if NAME.search(name)}


def merge(llm: nn.Module, whole=nullcontext):
    """Adds what the adapters give to the weights beneath, in place, and takes the adapters out. Each sum is in fp32,
    one layer at a time, whatever the weights are in. whole: a context within which a list of parameters is whole, for
    those that are sharded."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(llm.named_modules()):
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            with whole(list(base.parameters())), torch.no_grad():
                for adapter in module.active_adapters:
                    base.weight.copy_(base.weight.float() + module.get_delta_weight(adapter).float())
            llm.set_submodule(name, base)


# ----------------------------------------------------------------------------------------------------------- on disk


def save_adapter(directory: Path, weights: dict[str, torch.Tensor], config: LoraConfig, llm: str):
    """weights: by name in the LLM. A directory that `PeftModel.from_pretrained` loads onto the LLM at `llm`."""
    directory.mkdir(exist_ok=True)
    peft = peft_config(config, llm)
    peft.target_modules = set(target_modules(weights))
    peft.inference_mode = True
    peft.save_pretrained(directory)
    named = {SAVED + NAME.sub(r".\1.", name): value.contiguous() for name, value in weights.items()}
    save_file(named, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def target_modules(names) -> list[str]:
    """The modules that have adapters, by their last name, as in config.targets."""
    return sorted({NAME.split(name)[0].rpartition(".")[2] for name in names})


def read_config(directory: Path) -> LoraConfig:
    """Of an adapter directory. LoraError where it cannot be read, or is a kind of adapter that is not ours."""
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoraError(f"{path} cannot be read: {error}") from error
    if (
        values.get("peft_type") != "LORA"
        or values.get("use_dora")
        or values.get("use_rslora")
        or values.get("rank_pattern")
    ):
        raise LoraError(f"{path} is of another kind of adapter, expected plain LoRA")
    targets = values["target_modules"]
    names = None if targets == "all-linear" else tuple(sorted(targets))
    return LoraConfig(rank=values["r"], alpha=values["lora_alpha"], dropout=values["lora_dropout"], targets=names)


def load_adapter(llm: nn.Module, directory: Path):
    """Put an adapter directory's weights into the adapters of `llm`. LoraError unless every name and shape matches."""
    try:
        saved = load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{directory / WEIGHTS_FILE} cannot be read: {error}") from error
    wanted = {SAVED + NAME.sub(r".\1.", name): parameter for name, parameter in adapters(llm).items()}
    wrong = sorted(
        name for name in saved.keys() | wanted.keys()
        if name not in saved or name not in wanted or saved[name].shape != wanted[name].shape
    )  # fmt: skip
    if wrong:
        raise LoraError(
            f"{directory} does not fit: {len(wrong)} tensors, {wrong[0]} among them; other model.lora settings or LLM?"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


# ------------------------------------------------------------------------------------------------------------ dropout


def has_dropout(llm_config) -> bool:
    """Whether an LLM drops out by itself while it trains, as GPT-2 and Phi do: dropout, resid_pdrop, layerdrop, ..."""
    return any(
        "drop" in name and isinstance(value, float) and value > 0 for name, value in llm_config.to_dict().items()
    )


def draw_dropout_from(seed: int):
    """A forward pre-hook of ProteinGPT: what is dropped is a function of the seed and of the pack, so that a run
    resumes as it would have gone on."""

    def before(model: nn.Module, inputs: tuple):
        if model.training:
            pack = inputs[0]
            torch.manual_seed(zlib.crc32(" ".join([str(seed), *pack.keys, *map(str, pack.targets.tolist())]).encode()))

    return before
