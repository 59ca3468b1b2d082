"""From directories on disk to a ProteinGPT, and back: loading an LLM, and the exported model directory.

An exported directory holds `projector.safetensors`, the tokenizer, `model.json` (which encoders, which LLM, which
prompt) and, where the LLM was trained, `llm/` with its weights or `adapter/` with what LoRA adds; a frozen LLM is
named, not copied.
"""

import importlib.util
import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from proteingpt.config import LoraConfig, ModelConfig
from proteingpt.data.prompts import Template
from proteingpt.model import attention, lora
from proteingpt.model.projector import Projector
from proteingpt.model.protein_gpt import ProteinGPT

PROJECTOR, LLM = "projector.", "llm."  # prefixes of the parameter names of ProteinGPT's two parts
PROJECTOR_FILE = "projector.safetensors"
# A context within which parameters that are sharded already are whole: training.engine.gathered, or none.
Whole = Callable[[list[torch.nn.Parameter]], AbstractContextManager]
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # as configurations call it


class ModelError(ValueError):
    """A model directory that cannot serve."""


@dataclass(frozen=True)
class ModelInfo:
    """model.json. Widths are those of the encoders' rows; esm2, esm_if1: a published name or a file, or none with width
    0; fingerprints: sha256 of the encoders' files, so that a model is never asked with other features than it learned,
    and empty where they were not known (published embeddings); esm2_layer: whose rows, null for the last.
    """

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
    esm2_layer: int | None = None
    projector: str = "linear"
    projector_tokens: int | None = None
    projector_width: int | None = None
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


def load_llm(directory: str, dtype: torch.dtype | str, device: torch.device | str = "cpu", eight_bit: bool = False):
    """Any causal LM of transformers from a local directory, with shared-prefix attention. dtype: "auto" for its files'
    own.

    Read tensor by tensor onto the device, from files that all processes of a host have mapped together, so that the
    host holds no copy of its own for a GPU. Within training.engine.sharded_loading each rank keeps its share only.

    eight_bit: its linear layers but for the head in bitsandbytes' int8, with a scale a row; they can only be frozen.

    ModelError where it cannot be loaded, or only in part: transformers would draw what is missing at random.
    """
    check_llm(directory)
    straight = torch.device(device).type != "cpu" or eight_bit
    try:
        llm, loaded = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=attention.NAME, local_files_only=True, output_loading_info=True,
            device_map={"": device} if straight and not is_deepspeed_zero3_enabled() else None,
            quantization_config=in_8_bits() if eight_bit else None,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.llm: {directory} is no causal LM that transformers can load: {error}") from error
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ModelError(f"model.llm: the weights in {directory} lack {len(missing)} tensors, {missing[0]} among them")
    # Its own habits of decoding, such as the repetition penalty of many a chat model, are no part of a greedy answer.
    llm.generation_config = GenerationConfig()
    return llm


def in_8_bits() -> BitsAndBytesConfig:
    """ModelError where the library is not there, or ZeRO 3 would cut up what it cannot put together again."""
    if is_deepspeed_zero3_enabled():
        raise ModelError("model.llm_8bit does not go with ZeRO 3, which cuts the LLM up: use ds_configs/zero2.json")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.llm_8bit needs the package bitsandbytes: pip install 'proteingpt[8bit]', or set it to false"
        )
    return BitsAndBytesConfig(load_in_8bit=True)


def check_llm(directory: str | None):
    if directory is None:
        raise ModelError(
            "model.llm is not set: give --llm DIR, a local directory of a causal LM in Hugging Face format"
        )
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
        raise ModelError(
            f"{type(config).__name__} does not say how long a context the LLM has ({', '.join(CONTEXT_NAMES)})"
        )
    return min(longest, window or longest)


def build_model(
    config: ModelConfig,
    structure_width: int,
    sequence_width: int,
    dtype: torch.dtype,
    seed: int,
    device: torch.device | str = "cpu",
    whole: Whole = nullcontext,
) -> ProteinGPT:
    """LLM from config.llm; projector and adapters drawn from `seed`; or any of them from config.init_from;
    requires_grad as config.train. whole: for an LLM that is loaded within training.engine.sharded_loading."""
    source = Path(config.init_from) if config.init_from else None
    llm = load_llm(base_llm(config), dtype, device, config.llm_8bit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = make_projector(config, structure_width, sequence_width, llm.config.hidden_size)
    projector.to(device, dtype)
    if source:
        load_projector(projector, source)
    prepare_llm(llm, config, seed, dtype, whole)
    if config.activation_checkpointing:
        # Re-entrant checkpointing finds no gradient to compute where a layer's only input that needs one is a kwarg.
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = ProteinGPT(projector, llm, config.attention)
    if config.lora.dropout or lora.has_dropout(llm.config):
        model.register_forward_pre_hook(lora.draw_dropout_from(seed))
    return model


def base_llm(config: ModelConfig) -> str:
    """The directory of the weights that training starts from: the LLM's, or the one that init_from has trained."""
    trained = Path(config.init_from or ".") / "llm"
    return str(trained) if config.init_from and trained.is_dir() else config.llm


def make_projector(settings, structure_width: int, sequence_width: int, llm_width: int) -> Projector:
    """settings: a ModelConfig or a ModelInfo."""
    return Projector(
        structure_width,
        sequence_width,
        llm_width,
        settings.projector,
        settings.projector_tokens,
        settings.projector_width,
    )


def prepare_llm(llm, config: ModelConfig, seed: int, dtype: torch.dtype, whole: Whole):
    """Freeze what config.train freezes, and put adapters in; those of config.init_from go on, or are added to the
    weights."""
    saved = Path(config.init_from) / lora.ADAPTER if config.init_from else None
    has_adapter = saved is not None and saved.is_dir()
    try:
        if config.train == "lora" or has_adapter:
            lora.add_adapters(llm, config.lora if config.train == "lora" else lora.read_config(saved), seed, dtype)
        if has_adapter:
            lora.load_adapter(llm, saved)
    except lora.LoraError as error:
        raise ModelError(str(error)) from error
    if has_adapter and config.train == "full":
        lora.merge(llm, whole)
    if config.train != "lora":
        llm.requires_grad_(config.train == "full")


def check_init_from(config: ModelConfig):
    directory = config.init_from
    if directory is not None and config.train == "projector" and (Path(directory) / lora.ADAPTER).is_dir():
        raise ModelError(
            f"model.init_from: {directory} has a LoRA adapter, which model.train: projector would leave behind; train "
            "lora goes on with it, or export that run with model.lora.merge_on_export"
        )
    if directory is not None and not (Path(directory) / PROJECTOR_FILE).is_file():
        raise ModelError(
            f"model.init_from: {directory} holds no {PROJECTOR_FILE}, expected the model directory of a run of stage "
            "align; train that first, give its RUN/model, or null to start from a random projector"
        )


def load_projector(projector: Projector, directory: Path):
    path = directory / PROJECTOR_FILE
    try:
        projector.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is broken: {error}") from error
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit this LLM, model.projector and these encoders: {error}") from None


def trainable_names(model: ProteinGPT) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def shape_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Of the whole: one that ZeRO 3 has cut up is empty, and keeps its shape beside."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def set_weights(
    model: ProteinGPT,
    weights: dict[str, torch.Tensor],
    whole: Whole = nullcontext,
):
    """Put saved trainable weights into a model, by every rank. Every name and shape must match."""
    wanted = set(trainable_names(model))
    if wanted != set(weights):
        missing, extra = sorted(wanted - set(weights)), sorted(set(weights) - wanted)
        raise ModelError(f"saved weights do not match model.train: missing {missing[:3]}, not trained here {extra[:3]}")
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        found, shape = tuple(value.shape), shape_of(parameters[name])
        if found != shape:
            raise ModelError(f"saved weights do not fit this model: {name} is {found}, wanted {shape}; another LLM?")
    with torch.no_grad():
        for name, value in weights.items():
            with whole([parameters[name]]):
                parameters[name].copy_(value)


# ---------------------------------------------------------------------------------------------------------- export


def export(
    directory: Path,
    weights: dict[str, torch.Tensor],
    info: ModelInfo,
    tokenizer,
    dtype: torch.dtype,
    adapter: LoraConfig | None = None,
):
    """Write the model directory. weights: by parameter name of ProteinGPT, as a checkpoint holds them. adapter: of
    LoRA, whose weights then are all that there is of the LLM."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = {
        prefix: {
            name.removeprefix(prefix): value.to(dtype) for name, value in weights.items() if name.startswith(prefix)
        }
        for prefix in (PROJECTOR, LLM)
    }
    save_file(parts[PROJECTOR], directory / PROJECTOR_FILE)
    if adapter:
        export_adapter(directory, parts[LLM], info, adapter, dtype)
    elif parts[LLM]:
        (directory / "llm").mkdir(exist_ok=True)
        config = llm_config(info.llm)
        config.dtype = dtype
        config.save_pretrained(directory / "llm")
        save_file(parts[LLM], directory / "llm" / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(directory / "tokenizer")
    (directory / "model.json").write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")


def export_adapter(
    directory: Path, weights: dict[str, torch.Tensor], info: ModelInfo, adapter: LoraConfig, dtype: torch.dtype
):
    """adapter/ beside the LLM that info names; or, merged, the whole LLM in llm/."""
    lora.save_adapter(directory / lora.ADAPTER, weights, adapter, info.llm)
    if adapter.merge_on_export:
        llm = load_llm(info.llm, "auto")  # as it is in its files: one copy in the host's memory
        put_adapter(llm, directory / lora.ADAPTER, torch.float32)
        lora.merge(llm)
        llm.to(dtype).save_pretrained(directory / "llm")
        shutil.rmtree(directory / lora.ADAPTER)


def put_adapter(llm, directory: Path, dtype: torch.dtype):
    """An adapter directory into an LLM, as it was trained."""
    try:
        lora.add_adapters(llm, lora.read_config(directory), 0, dtype)
        lora.load_adapter(llm, directory)
    except lora.LoraError as error:
        raise ModelError(str(error)) from error


def read_info(directory: Path) -> ModelInfo:
    path = directory / "model.json"
    if not path.is_file():
        raise ModelError(f"{directory} holds no model.json, expected a directory exported by training (RUN/model)")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != 1:
            raise ModelError(f"{path} has format {values.get('format')!r}, this version reads format 1")
        return ModelInfo(**{**values, "template": Template(**values["template"])})
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged, or of another version ({error}): copy it again") from error


def load_exported(directory: Path, dtype: torch.dtype, device) -> tuple[ProteinGPT, object, ModelInfo]:
    """(model in eval mode, tokenizer, info) from an exported directory. The encoders are loaded by who needs them."""
    info = read_info(directory)
    own_llm = directory / "llm"
    llm = load_llm(str(own_llm if own_llm.is_dir() else info.llm), dtype, device)
    if (directory / lora.ADAPTER).is_dir():
        put_adapter(llm, directory / lora.ADAPTER, dtype)
    projector = make_projector(info, info.structure_width, info.sequence_width, llm.config.hidden_size).to(dtype)
    load_projector(projector, directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / 'tokenizer'} holds no tokenizer that can be loaded: copy it again") from error
    return ProteinGPT(projector, llm).eval().requires_grad_(False).to(device), tokenizer, info
