"""The tiny language model, opened as any Hugging Face directory is."""

import hashlib
import os
import subprocess
import sys
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from proteingpt.demo.llm import write_tiny_llm

TEXTS = [
    "###Human: <protein><proteinHere></protein> What is the main secondary structure of this protein? ###Assistant: ",
    "This protein is mainly helix, begins with coil, contains a helix and no strand, and is longer than 40 residues.",
    "Its first residue is serine, its most frequent amino acid is alanine, and it contains no cysteine.",
]
CLASSES = {
    "llama": "LlamaForCausalLM",
    "llama3": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {name: write_tiny_llm(tmp_path_factory.mktemp(name), TEXTS, family=name, seed=5) for name in CLASSES}


@pytest.fixture(scope="module")
def tokenizer(directories):
    return AutoTokenizer.from_pretrained(directories["llama"], local_files_only=True)


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("family", CLASSES)
def test_each_family_loads_as_its_class_and_scores_every_token(directories, family):
    model = load(directories[family])
    tokenizer = AutoTokenizer.from_pretrained(directories[family], local_files_only=True)
    assert type(model).__name__ == CLASSES[family]
    assert model.config.max_position_embeddings == 4096 and model.dtype == torch.float32
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    logits = model(input_ids=ids).logits
    assert logits.shape == (1, ids.shape[1], len(tokenizer)) and torch.isfinite(logits).all()


@pytest.mark.parametrize("family", CLASSES)
def test_special_tokens_of_config_and_tokenizer_are_the_same_rows(directories, family):
    tokenizer = AutoTokenizer.from_pretrained(directories[family], local_files_only=True)
    config = load(directories[family]).config
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids == [config.bos_token_id, config.eos_token_id, config.pad_token_id] == [0, 1, 2]
    assert max(tokenizer.get_vocab().values()) < config.vocab_size


def test_llama3_groups_queries_ties_embeddings_and_turns_slowly(directories):
    model = load(directories["llama3"])
    # Base 500000, head size 24: the slowest of the 12 angles per position is 500000 ** (-22 / 24).
    assert model.model.rotary_emb.inv_freq[-1].item() == pytest.approx(500000 ** (-22 / 24), rel=1e-5)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (48, 96)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_plain_llama_does_neither(directories):
    model = load(directories["llama"])
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (96, 96)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    "text",
    [
        "###Human: <protein><proteinHere></protein> Which one? ###Assistant: helix###",
        "a line\nand  another,\ttabbed \n\n",
        "  spaces before and behind  ",
        "naïve Ångström µm, β-Faltblatt, 蛋白质, 🧬, \u200b\u0000",
        "",
    ],
)
def test_text_survives_encoding_and_decoding(directories, family, text):
    tokenizer = AutoTokenizer.from_pretrained(directories[family], local_files_only=True)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@settings(deadline=None)
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_qwen2_composes_characters_first(directories):
    """transformers opens that directory as Qwen2Tokenizer, which normalises to NFC."""
    tokenizer = AutoTokenizer.from_pretrained(directories["qwen2"], local_files_only=True)
    decomposed = "A\u030angstro\u0308m, e\u0301"
    decoded = tokenizer.decode(tokenizer.encode(decomposed, add_special_tokens=False))
    assert decoded == unicodedata.normalize("NFC", decomposed)


@pytest.mark.parametrize("family", CLASSES)
def test_bos_comes_first_only_when_special_tokens_are_asked_for(directories, family):
    tokenizer = AutoTokenizer.from_pretrained(directories[family], local_files_only=True)
    plain = tokenizer.encode("helix", add_special_tokens=False)
    assert tokenizer.bos_token_id not in plain
    assert tokenizer.encode("helix", add_special_tokens=True) == [tokenizer.bos_token_id] + plain


def test_words_of_the_texts_became_tokens_and_the_size_is_capped(tmp_path, tokenizer):
    assert 256 + 3 < len(tokenizer) <= 512
    assert len(tokenizer.encode(" protein", add_special_tokens=False)) == 1
    small = AutoTokenizer.from_pretrained(write_tiny_llm(tmp_path, TEXTS, vocab_size=300), local_files_only=True)
    assert len(small) == 300


def test_the_same_seed_writes_the_same_bytes_in_another_process(tmp_path, directories):
    """Another process, since hash order is what would differ."""
    code = (
        "import sys; from proteingpt.demo.llm import write_tiny_llm; "
        "write_tiny_llm(sys.argv[1], sys.argv[2:], family='llama', seed=5)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again"), *TEXTS], check=True, env=environment)
    written = digests(tmp_path / "again")
    assert written == digests(directories["llama"])
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(written)


def test_another_seed_changes_the_weights_only(tmp_path, directories):
    other = digests(write_tiny_llm(tmp_path / "other", TEXTS, seed=6))
    changed = [name for name, digest in digests(directories["llama"]).items() if other[name] != digest]
    assert changed == ["model.safetensors"]


def test_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    write_tiny_llm(tmp_path, TEXTS)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"family": "gpt5"}, "family 'gpt5' is unknown: choose one of llama, llama3, mistral, qwen2"),
        ({"width": 90}, "width 90 with 4 heads"),
        ({"num_heads": 3}, "width 96 with 3 heads"),
        ({"vocab_size": 200}, "vocab_size 200 is too small: wanted at least 259"),
    ],
)
def test_refuses_settings_that_no_model_can_have(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write_tiny_llm(tmp_path, TEXTS, **settings)
    assert not list(tmp_path.iterdir())
