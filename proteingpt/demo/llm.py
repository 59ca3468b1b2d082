"""A tiny language model with random weights in the ordinary Hugging Face directory format, for the demo and the tests.

The tokenizer is a byte-level BPE trained on the texts at hand: any text encodes, and decodes to itself. The same
files serve every family, so a family changes the model class and its configuration only. Given up: a tokenizer in each
family's own style (Qwen2's real one has no BOS). transformers opens the one beside a `qwen2` model as Qwen2Tokenizer,
which composes characters first (NFC).
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# This EOS, because Qwen2Tokenizer would add it to any vocabulary without it, as an id that the model has no row for.
BOS, EOS, PAD = "<s>", "<|endoftext|>", "<pad>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
NUM_BYTES = 256

# What tells the families apart at this size. Theta, grouped queries and tied embeddings of `llama3` are those of the
# published Llama 3.2 1B; `mistral` has no sliding window, as since v0.2.
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
}


def write_tiny_llm(
    directory: str | Path,
    texts: Iterable[str],
    *,
    family: str = "llama",
    seed: int = 0,
    width: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    vocab_size: int = 512,
    max_positions: int = 4096,
    initializer_range: float = 0.02,
) -> Path:
    """Writes config, float32 safetensors and tokenizer into `directory` (made if missing), and returns it.

    `AutoModelForCausalLM` and `AutoTokenizer.from_pretrained(directory, local_files_only=True)` load it. The tokenizer
    has at most `vocab_size` tokens, fewer where the texts are too short for as many merges; the model has one
    embedding row for each. Same arguments, same bytes. The global torch generator is left as it was.
    Raises ValueError for an unknown family, sizes that do not divide, or a vocabulary too small for the 256 bytes.
    """
    _check(family, width, num_heads, vocab_size)
    directory = Path(directory)
    tokenizer = _train_tokenizer(texts, vocab_size, max_positions)
    config = AutoConfig.for_model(
        **{"num_key_value_heads": num_heads, "tie_word_embeddings": False, **FAMILIES[family]},
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_positions,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _check(family: str, width: int, num_heads: int, vocab_size: int) -> None:
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown: choose one of {', '.join(sorted(FAMILIES))}")
    if num_heads % 2 or width % (2 * num_heads):
        raise ValueError(
            f"width {width} with {num_heads} heads: wanted an even number of heads, of even size each "
            "(grouped queries share keys in pairs, rotary positions turn pairs); choose a width that 2 * heads divides"
        )
    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small: wanted at least {smallest}, the bytes and specials")


def _train_tokenizer(texts: Iterable[str], vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Special tokens take ids 0, 1, 2. BOS is put first, nothing last, as Llama and Mistral tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
