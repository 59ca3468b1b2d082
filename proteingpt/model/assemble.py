"""From directories on disk to a ProteinGPT, and back: loading an LLM, and the exported model directory.

An exported directory holds `projector.safetensors`, the tokenizer, `model.json` (which encoders, which LLM, which prompt)
and, where the LLM was trained, `llm/` with its weights; a frozen LLM is named, not copied.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from proteingpt.config import ModelConfig
from proteingpt.data.prompts import Template
from proteingpt.model import attention
from proteingpt.model.projector import Projector
from proteingpt.model.protein_gpt import ProteinGPT

PROJECTOR, LLM = "projector.", "llm."  # prefixes of the parameter names of ProteinGPT's two parts
PROJECTOR_FILE = "projector.safetensors"
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # as configurations call it


class ModelError(ValueError):
    """A model directory that cannot serve."""


@dataclass(frozen=True)
class ModelInfo:
    """model.json. Widths are those of the encoders' rows; esm2, esm_if1: a published name or a file; fingerprints:
    sha256 of the encoders' files, so that a model is never asked with other features than it learned."""

    llm: str
    esm2: str
    esm_if1: str
    esm2_fingerprint: str
    esm_if1_fingerprint: str
    weights_dir: str
    encoder_dtype: str
    structure_width: int
    sequence_width: int
    template: Template
    stage: str
    format: int = 1


def load_tokenizer(directory: str):
    check_llm(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.llm: {directory} holds no tokenizer that transformers can load: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {directory} has no end-of-sequence token; an answer could never end")
    return tokenizer


def load_llm(directory: str, dtype: torch.dtype):
    """Any causal LM of transformers from a local directory, with shared-prefix attention.

    ModelError where it cannot be loaded, or only in part: transformers would draw what is missing at random.
    """
    check_llm(directory)
    try:
        llm, loaded = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=attention.NAME, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.llm: {directory} is no causal LM that transformers can load: {error}") from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ModelError(f"model.llm: the weights in {directory} lack {len(missing)} tensors, {missing[0]} among them")
    # Its own habits of decoding, such as the repetition penalty of many a chat model, are no part of a greedy answer.
    llm.generation_config = GenerationConfig()
    return llm


def check_llm(directory: str | None):
    if directory is None:
        raise ModelError("model.llm is not set: give --llm DIR, a local directory of a causal LM in Hugging Face format")
    if not (Path(directory) / "config.json").is_file():
        raise ModelError(f"model.llm: {directory} holds no config.json, expected a causal LM in Hugging Face format")


def llm_config(directory: str):
    check_llm(directory)
    return AutoConfig.from_pretrained(directory, local_files_only=True)


def context_length(config) -> int:
    """Tokens a sample may have. A sliding window is refused rather than ignored: no sample may be longer than it."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    longest = next((n for n in map(lambda name: getattr(config, name, None), CONTEXT_NAMES) if n), None)
    if longest is None:
        raise ModelError(f"{type(config).__name__} does not say how long a context the LLM has ({', '.join(CONTEXT_NAMES)})")
    return min(longest, window or longest)


def build_model(
    config: ModelConfig, structure_width: int, sequence_width: int, dtype: torch.dtype, seed: int
) -> ProteinGPT:
    """LLM from config.llm; the projector drawn from `seed`, or from config.init_from; requires_grad as config.train."""
    source = Path(config.init_from) if config.init_from else None
    trained_llm = source / "llm" if source and (source / "llm").is_dir() else None
    llm = load_llm(str(trained_llm or config.llm), dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(structure_width, sequence_width, llm.config.hidden_size).to(dtype)
    if source:
        load_projector(projector, source)
    llm.requires_grad_(config.train == "full")
    if config.activation_checkpointing:
        # Re-entrant checkpointing finds no gradient to compute where a layer's only input that needs one is a kwarg.
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return ProteinGPT(projector, llm)


def check_init_from(directory: str | None):
    if directory is not None and not (Path(directory) / PROJECTOR_FILE).is_file():
        raise ModelError(
            f"model.init_from: {directory} holds no {PROJECTOR_FILE}, expected the model directory of a run of stage "
            "align; train that first, give its RUN/model, or null to start from a random projector"
        )


def load_projector(projector: Projector, directory: Path):
    path = directory / PROJECTOR_FILE
    try:
        projector.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ModelError(f"{path} is broken: {error}") from error
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit this LLM and these encoders: {error}") from None


def trainable_names(model: ProteinGPT) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def set_weights(model: ProteinGPT, weights: dict[str, torch.Tensor]):
    """Put saved trainable weights into a model that is not sharded yet. Every name and shape must match."""
    wanted = set(trainable_names(model))
    if wanted != set(weights):
        missing, extra = sorted(wanted - set(weights)), sorted(set(weights) - wanted)
        raise ModelError(f"saved weights do not match model.train: missing {missing[:3]}, not trained here {extra[:3]}")
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        if value.shape != parameters[name].shape:
            found, shape = tuple(value.shape), tuple(parameters[name].shape)
            raise ModelError(f"saved weights do not fit this model: {name} is {found}, wanted {shape}; another LLM?")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


# ---------------------------------------------------------------------------------------------------------- export


def export(directory: Path, weights: dict[str, torch.Tensor], info: ModelInfo, tokenizer, dtype: torch.dtype):
    """Write the model directory. weights: by parameter name of ProteinGPT, as a checkpoint holds them."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = {
        prefix: {name.removeprefix(prefix): value.to(dtype) for name, value in weights.items() if name.startswith(prefix)}
        for prefix in (PROJECTOR, LLM)
    }
    save_file(parts[PROJECTOR], directory / PROJECTOR_FILE)
    if parts[LLM]:
        (directory / "llm").mkdir(exist_ok=True)
        config = llm_config(info.llm)
        config.dtype = dtype
        config.save_pretrained(directory / "llm")
        save_file(parts[LLM], directory / "llm" / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(directory / "tokenizer")
    (directory / "model.json").write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")


def read_info(directory: Path) -> ModelInfo:
    path = directory / "model.json"
    if not path.is_file():
        raise ModelError(f"{directory} holds no model.json, expected a directory exported by training (RUN/model)")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("format") != 1:
        raise ModelError(f"{path} has format {values.get('format')!r}, this version reads format 1")
    return ModelInfo(**{**values, "template": Template(**values["template"])})


def load_exported(directory: Path, dtype: torch.dtype, device) -> tuple[ProteinGPT, object, ModelInfo]:
    """(model in eval mode, tokenizer, info) from an exported directory. The encoders are loaded by who needs them."""
    info = read_info(directory)
    own_llm = directory / "llm"
    llm = load_llm(str(own_llm if own_llm.is_dir() else info.llm), dtype)
    projector = Projector(info.structure_width, info.sequence_width, llm.config.hidden_size).to(dtype)
    load_projector(projector, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
    return ProteinGPT(projector, llm).eval().requires_grad_(False).to(device), tokenizer, info
