"""Answers: where they end, and that asking together is asking alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proteingpt.data.prompts import TEMPLATES, Prompt, Template
from proteingpt.data.shards import ShardSet
from proteingpt.inference.generate import EMPTY, EndOfAnswer, answer, clean, left_padded
from proteingpt.model import attention
from proteingpt.model.assemble import load_llm
from proteingpt.model.projector import Projector
from proteingpt.model.protein_gpt import ProteinGPT

RELEASED = TEMPLATES["released", "instruct"]
QUESTIONS = ["What is it?", "Does this protein contain a helix or anything else of note?", "", "Why?"]


# -------------------------------------------------------------------------------------------------- by characters


@pytest.mark.parametrize(
    "family, stage, text, wanted",
    [
        ("released", "instruct", "helix###", "helix"),
        ("released", "instruct", " helix ### more ###", "helix"),
        ("released", "instruct", "helix", "helix"),  # never ended: all of it
        ("released", "instruct", "a # b ## c", "a # b ## c"),
        ("released", "instruct", "two\nlines###", "two\nlines"),
        ("released", "instruct", "helix</s></s>", "helix"),
        ("released", "instruct", "helix###</s></s>", "helix"),
        ("released", "instruct", "###", EMPTY),
        ("released", "instruct", "  \n ###", EMPTY),
        ("released", "instruct", "", EMPTY),
        ("released", "align", "A small enzyme.\nAnd more", "A small enzyme."),
        ("released", "align", "\n", EMPTY),
        ("paper", "instruct", "helix</s></s>", "helix"),
        ("paper", "instruct", "a ### b\nc</s>", "a ### b\nc"),
        ("paper", "instruct", "</s>", EMPTY),
    ],
)
def test_an_answer_is_cut_at_its_end_symbol(characters, family, stage, text, wanted):
    assert clean(text, Prompt(characters(), TEMPLATES[family, stage], 10)) == wanted


def test_an_empty_answer_is_what_the_published_scoring_calls_it():
    assert EMPTY == "N/A"


def ended(prompt, texts: list[str]) -> list[bool]:
    ids = torch.tensor([[ord(c) for c in text] for text in texts])
    return EndOfAnswer(prompt)(ids, scores=None).tolist()


def test_each_row_ends_once_its_text_holds_the_symbol(characters):
    prompt = Prompt(characters(), RELEASED, 10)
    assert ended(prompt, ["helix##", "coil###", "a # # #", "#######"]) == [False, True, False, True]
    assert ended(prompt, ["#"]) == [False] and ended(prompt, ["###"]) == [True]
    assert ended(Prompt(characters(), TEMPLATES["released", "align"], 10), ["ab", "a\n"]) == [False, True]


# ------------------------------------------------------------------------------------------------- with the tiny LLM


@pytest.fixture(scope="module")
def tokenizer(demo_assets):
    return AutoTokenizer.from_pretrained(demo_assets / "llm", local_files_only=True)


def test_merged_tokens_end_no_sooner_and_no_later(demo_assets, tokenizer):
    """The tokenizer was trained on such text and merges # with #: the end shows with the last token, never before."""
    prompt = Prompt(tokenizer, RELEASED, 100)
    shards = ShardSet(demo_assets, "test")
    for ids in prompt.answer_ids(sorted({turn.answer for i in range(4) for turn in shards.read_text(i)[1]})):
        begun = [EndOfAnswer(prompt)(torch.tensor([ids[:n]]), None).item() for n in range(1, len(ids) + 1)]
        assert begun == [False] * (len(ids) - 1) + [True]


@pytest.fixture(scope="module")
def model(demo_assets):
    """Random weights drawn wide, so that the answers depend on the question and no two logits are near each other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        llm = load_llm(str(demo_assets / "llm"), torch.float32)
        for parameter in llm.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
        return ProteinGPT(Projector(6, 10, llm.config.hidden_size), llm).eval()


@pytest.fixture(scope="module")
def rows():
    """Encoder rows of a protein of 5 residues: structure (7, 6), sequence (7, 10)."""
    generator = torch.Generator().manual_seed(8)
    return torch.randn(7, 6, generator=generator), torch.randn(7, 10, generator=generator)


def whole_prompt(model, prompt, rows, question: str) -> torch.Tensor:
    """(T, width) of one question, put together piece by piece."""
    words = model.llm.get_input_embeddings().weight
    structure = rows[0] @ model.projector.structure.weight.T + model.projector.structure.bias
    sequence = rows[1] @ model.projector.sequence.weight.T + model.projector.sequence.bias
    after = prompt.template.after.replace("{question}", question)
    ids = [prompt.tokenizer.encode(text, add_special_tokens=False) for text in (prompt.template.before, after)]
    return torch.cat([words[[prompt.tokenizer.bos_token_id, *ids[0]]], structure, sequence, words[ids[1]]]).detach()


def test_prompts_are_padded_on_the_left(model, rows, tokenizer):
    prompt = Prompt(tokenizer, RELEASED, 100)
    with torch.no_grad():
        embeddings, mask = left_padded(model, prompt, *rows, QUESTIONS)
    alone = [whole_prompt(model, prompt, rows, question) for question in QUESTIONS]
    longest = max(len(one) for one in alone)
    assert embeddings.shape == (4, longest, model.llm.config.hidden_size) and mask.shape == (4, longest)
    for row, seen, one in zip(embeddings, mask, alone):
        padding = longest - len(one)
        assert seen.tolist() == [0] * padding + [1] * len(one)
        torch.testing.assert_close(row[padding:], one)
        assert not row[:padding].any()
    assert len({len(one) for one in alone}) > 1  # else there is nothing to pad


def greedy(demo_assets, model, prompt, rows, question: str, num_tokens: int) -> list[int]:
    """The definition: one question, no padding, no cache, transformers' plain attention, argmax after argmax."""
    options = {"attn_implementation": "eager", "local_files_only": True}
    plain = AutoModelForCausalLM.from_pretrained(demo_assets / "llm", **options)
    plain.load_state_dict(model.llm.state_dict())
    embeddings, ids = whole_prompt(model, prompt, rows, question), []
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(plain(inputs_embeds=embeddings[None]).logits[0, -1].argmax()))
            embeddings = torch.cat([embeddings, plain.get_input_embeddings().weight[ids[-1]][None]])
    return ids


@pytest.fixture(scope="module")
def by_hand(demo_assets, model, rows, tokenizer):
    prompt = Prompt(tokenizer, RELEASED, 100)
    return [greedy(demo_assets, model, prompt, rows, question, 12) for question in QUESTIONS]


def test_questions_asked_together_are_answered_as_each_alone(model, rows, tokenizer, by_hand):
    prompt = Prompt(tokenizer, RELEASED, 100)
    texts = answer(model, prompt, *rows, QUESTIONS, max_new_tokens=12)
    assert texts == [clean(tokenizer.decode(ids), prompt) for ids in by_hand]
    assert len(set(texts)) > 1  # else the question would not matter


def test_an_answer_ends_at_its_symbol_while_the_others_go_on(model, rows, tokenizer, by_hand):
    """The end symbol is made of what the first answer says in the middle."""
    end = tokenizer.decode(by_hand[0][4:6])
    assert end.strip()
    template = Template(RELEASED.before, RELEASED.after, end)
    texts = answer(model, Prompt(tokenizer, template, 100), *rows, QUESTIONS, max_new_tokens=12)
    uncut = [tokenizer.decode(ids) for ids in by_hand]
    assert texts == [text.split(end)[0].split("<|endoftext|>")[0].strip() or EMPTY for text in uncut]
    assert len(texts[0]) < len(uncut[0].strip()) and any(end not in text for text in uncut)


def test_no_answer_is_longer_than_asked_for(model, rows, tokenizer, by_hand):
    prompt = Prompt(tokenizer, RELEASED, 100)
    texts = answer(model, prompt, *rows, QUESTIONS, max_new_tokens=3)
    assert texts == [clean(tokenizer.decode(ids[:3]), prompt) for ids in by_hand]


def test_the_model_trains_on_with_the_attention_it_had(model, rows, tokenizer):
    answer(model, Prompt(tokenizer, RELEASED, 100), *rows, QUESTIONS[:1], max_new_tokens=1)
    assert model.llm.config._attn_implementation == attention.NAME
