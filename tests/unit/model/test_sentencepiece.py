"""A `tokenizer.model` as Vicuna and LLaMA-2 ship it, against the sentencepiece library itself."""

import json

import pytest
import sentencepiece

from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.model.assemble import load_tokenizer

TEXTS = [
    "Q: <protein>",
    "</protein>Is it an enzyme? A: ",
    "###Human: <protein>",
    "</protein> Is it? ###Assistant: ",
    "Yes###",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A byte-fallback BPE model with LLaMA's special tokens and white space kept, as in the published file."""
    path = tmp_path_factory.mktemp("vicuna")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **special}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


@pytest.mark.parametrize("text", [*TEXTS, "Zürich, 2 Å"])
def test_ids_are_those_of_sentencepiece(directory, text):
    expected = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).encode(text)
    assert load_tokenizer(str(directory))(text, add_special_tokens=False)["input_ids"] == expected


def test_a_prompt_has_one_bos_and_ends_as_its_template_says(directory):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    prompt = Prompt(load_tokenizer(str(directory)), TEMPLATES["released", "instruct"], 10)
    assert prompt.prefix_ids == [1, *pieces.encode("###Human: <protein>")]
    assert prompt.question_ids(["Is it?"]) == [pieces.encode("</protein> Is it? ###Assistant: ")]
    assert prompt.answer_ids(["Yes"]) == [pieces.encode("Yes###")]
    paper = Prompt(prompt.tokenizer, TEMPLATES["paper", "instruct"], 10)
    assert paper.answer_ids(["Yes"]) == [[*pieces.encode("Yes"), 2]] and paper.end_text == "</s>"
