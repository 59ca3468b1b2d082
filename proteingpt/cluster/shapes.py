"""Language models by name, without their weights, and what a step executes in them.

Shapes are those of the published config.json files. FLOPs are those that are executed: of matrix products as
model.flops counts them, forward once more under checkpointing, and of attention.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig

from proteingpt.data.collate import Pack
from proteingpt.model import assemble
from proteingpt.model.flops import matrix_flops
from proteingpt.model.protein_gpt import LOGITS_BYTES, PLAIN_HEADS

LLAMA2_7B = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, max_position_embeddings=4096,
)  # fmt: skip
LLAMA3_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)  # fmt: skip
TINY = {**LLAMA3_8B, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
SMALL = {**TINY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 4096}  # fmt: skip
NAMED = {
    "vicuna-7b": ("llama", LLAMA2_7B),
    "llama-2-7b": ("llama", LLAMA2_7B),
    "llama-3-8b": ("llama", LLAMA3_8B),
    "mistral-7b": ("mistral", {**LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8,
                               "max_position_embeddings": 32768, "sliding_window": None}),
    "llama-3-70b": ("llama", {**LLAMA3_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                              "num_attention_heads": 64}),
    "tiny": ("llama", TINY),
    "small": ("llama", SMALL),
}  # fmt: skip


class ShapeError(ValueError):
    """No such language model."""


def llm_config(name: str):
    """transformers' configuration of a named shape, or of a model directory."""
    if name in NAMED:
        family, shape = NAMED[name]
        return AutoConfig.for_model(family, **shape)
    if not (Path(name) / "config.json").is_file():
        raise ShapeError(f"--llm {name}: no model directory, and none of the shapes known here: {', '.join(NAMED)}")
    return assemble.llm_config(name)


class Pairs(NamedTuple):
    """Pairs of tokens that see each other: both on a prefix, or the one on a branch."""

    prefix: int
    branch: int


def pairs_of(prefix: int, branches: list[int]) -> Pairs:
    """Of a group."""
    return Pairs(prefix * (prefix + 1) // 2, sum(prefix * n + n * (n + 1) // 2 for n in branches))


def pack_pairs(pack: Pack) -> Pairs:
    starts = zip(pack.group_starts, pack.group_starts[1:])
    counts = [pack.branch_ids[begin:end].bincount().tolist() for begin, end in starts]
    return Pairs(*map(sum, zip(*(pairs_of(prefix, branches) for prefix, *branches in counts))))


def attention_flops(config, pairs: int, passes: float = 3) -> float:
    """Scores and weighted values: 4 FLOPs per pair and column of the heads in a pass; backward counts as two."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4.0 * passes * pairs * head * config.num_attention_heads * config.num_hidden_layers


class Flops(NamedTuple):
    """Of matrix products with weights, and of attention on prefixes and from branches, which devices do not compute at
    the same rate: what only looks back needs no mask."""

    matrix: float
    prefix: float = 0.0
    branch: float = 0.0


def total(parts: Iterable[Flops]) -> Flops:
    return Flops(*map(sum, zip(*parts)))


def step_flops(config, tokens: int, answers: int, pairs: Pairs, train: str, checkpointing: bool) -> Flops:
    """Executed in the forward and backward of a pack, beside the projector, a thousandth of it."""
    passes, again = 6 if train == "full" else 4, 2 if checkpointing else 0
    chunked = config.model_type in PLAIN_HEADS and answers * config.vocab_size * 4 > LOGITS_BYTES
    matrices = matrix_flops(config, tokens, answers, passes + again, passes + (2 if chunked else 0))
    return Flops(matrices, *(attention_flops(config, number, 4 if checkpointing else 3) for number in pairs))
