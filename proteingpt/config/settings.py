"""The settings of a recipe: a class for each section, a sentence for each field, the ranges and what excludes what."""

from dataclasses import dataclass
from typing import Literal

from proteingpt.config.addresses import has_password
from proteingpt.config.typed import require, setting

STAGES = ("align", "instruct")

PASSWORD_ADVICE = (
    "an address without the user and password that it was given with: others read them in the list of processes, in "
    "the launcher's log and in the run's recipe; put them where fsspec looks, in the environment (AWS_ACCESS_KEY_ID, "
    "..., FSSPEC_FTP_PASSWORD) or in ~/.config/fsspec/conf.json"
)
# In the place of an encoder's weights: the prompt then has no rows of it.
NO_ENCODER = "none"


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
    merge_on_export: bool = setting(
        "export the LLM with its adapters added in, whole, rather than beside it", default=False
    )

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
        "hold the frozen LLM in 8 bits (by bitsandbytes), in half the memory of bf16 and not quite the same",
        default=False,
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
        "instead of shards: {directory: weight, ...}; a protein of weight 1 is seen once in an epoch, of 2.5 two or "
        "three times, of 0.5 in every other, drawn anew each time",
        default=None,
    )
    embeddings: str | None = setting(
        "directory written by launch/cache_embeddings.py; null: encoders run with the training", default=None
    )
    max_residues: int | None = setting("longer proteins are left out, and counted in the log, or cropped", default=None)
    long_proteins: Literal["skip", "crop"] = setting(
        "those over max_residues: skip, or crop to a window drawn anew in each epoch, the middle in evaluation. "
        "Questions stay those of the whole protein, so that one about its length is answered wrong for a crop: hence "
        "skip",
        default="skip",
    )
    shards_per_window: int | None = setting(
        "shards read at a time: an epoch is shuffled within them; null: as many as hold 4 million questions",
        default=None,
    )
    cache_dir: str = setting(
        "where remote shards are kept, and what has been verified is remembered", default="shards/cache"
    )
    cache_gib: float = setting("bound of what remote shards take there", default=50.0)
    read_timeout_seconds: float = setting("a file that gives nothing for so long ends the run, named", default=50.0)
    max_bad_share: float = setting(
        "samples that cannot be read are left out, up to this share of those read", default=0.01
    )

    def __post_init__(self):
        places = {"shards": self.shards, "embeddings": self.embeddings}
        for name, place in [*places.items(), *(("mixture", place) for place in self.mixture or ())]:
            require(not has_password(place), name, place, PASSWORD_ADVICE)
        for name in ("max_residues", "shards_per_window", "cache_gib", "read_timeout_seconds"):
            require(getattr(self, name) is None or getattr(self, name) > 0, name, getattr(self, name), "> 0")
        if self.mixture is not None:
            both = (self.shards, self.mixture)
            require(self.shards is None, "shards, mixture", both, "one of the two, the other null")
            require(bool(self.mixture), "mixture", self.mixture, "{directory: weight, ...}, one at least")
            for place, weight in self.mixture.items():
                require(weight > 0, f"mixture[{place!r}]", weight, "> 0: leave a set out that is not to be seen")
            expected = "null with a mixture: cached rows are of one set"
            require(self.embeddings is None, "embeddings", self.embeddings, expected)
        if self.long_proteins == "crop":
            expected = "a length to crop to, with long_proteins: crop"
            require(self.max_residues is not None, "max_residues", None, expected)
            expected = "null with crop: cached rows are of whole proteins"
            require(self.embeddings is None, "embeddings", self.embeddings, expected)
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
    llm_lr_factor: float = setting(
        "the LLM's learning rate (or its adapters') is so many times the projector's", default=1.0
    )
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
        expected = f"between 0 and init_lr ({self.init_lr})"
        require(0 <= self.min_lr <= self.init_lr, "min_lr", self.min_lr, expected)
        expected = "> 0; a frozen LLM is model.train: projector"
        require(self.llm_lr_factor > 0, "llm_lr_factor", self.llm_lr_factor, expected)
        require(0 <= self.warmup_lr <= self.init_lr, "warmup_lr", self.warmup_lr, f"<= init_lr ({self.init_lr})")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, ">= 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every_steps: int | None = setting(
        "evaluate each so many steps, and at a stage's end; null: only there", default=None
    )
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
        "also keep the best of the evaluated steps, by held-out loss or exact-match accuracy, and export it",
        default=None,
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
    roll_back_after: int = setting(
        "so many skipped in a row: back to the last checkpoint, and past those steps", default=3
    )
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
        "a rank's capacity: packs are joined into forwards of at most so many tokens; auto: measured on each rank "
        "before a stage; null: one pack a forward",
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
    track: Literal["wandb", "mlflow"] | None = setting(
        "send what TensorBoard gets to Weights & Biases or MLflow as well; their own variables say where", default=None
    )
    demo: DemoConfig | None = setting("makes what is missing for a run on a fresh machine", default=None)

    def __post_init__(self):
        require(self.seed >= 0, "seed", self.seed, ">= 0")
        require(bool(self.stages), "align / instruct", None, "at least one of the two sections")
        for name, stage in self.stages.items():
            fits = self.model.train != "projector" or stage.llm_lr_factor == 1
            expected = "1 with model.train: projector, which freezes the LLM"
            require(fits, f"{name}.llm_lr_factor", stage.llm_lr_factor, expected)
        if self.devices.tokens_per_forward == "auto":
            for name, stage in self.stages.items():
                expected = "a number beside devices.tokens_per_forward auto: what is measured are whole packs"
                require(stage.tokens_per_pack is not None, f"{name}.tokens_per_pack", None, expected)

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages to run, in order."""
        return {name: getattr(self, name) for name in STAGES if getattr(self, name) is not None}
