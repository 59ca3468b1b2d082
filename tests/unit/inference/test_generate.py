"""Answers: where they end, and that asking together is asking alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from proteingpt.data.prompts import TEMPLATES, Prompt, Template
from proteingpt.data.shards import ShardSet
from proteingpt.demo.llm import write_tiny_llm
from proteingpt.inference.generate import (
    EMPTY,
    Asked,
    Decoding,
    answer,
    answer_batch,
    batches,
    cache_bytes_per_token,
    choose,
    clean,
    decode,
    draw,
    has_ended,
    held_back,
    protein_prefix,
    stop_ids,
    stream,
)
from proteingpt.model import attention
from proteingpt.model.attention import make_layout
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
    return has_ended(prompt, set(), [[ord(c) for c in text] for text in texts])


def test_each_row_ends_once_its_text_holds_the_symbol(characters):
    prompt = Prompt(characters(), RELEASED, 10)
    assert ended(prompt, ["helix##", "coil###", "a # # #", "#######"]) == [False, True, False, True]
    assert ended(prompt, []) == []  # a rank whose answers have ended waits for others
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
        begun = has_ended(prompt, set(), [ids[:n] for n in range(1, len(ids) + 1)])
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


def test_a_prefix_is_what_stands_before_the_question(model, rows, tokenizer):
    prompt = Prompt(tokenizer, RELEASED, 100)
    with torch.no_grad():
        prefix = protein_prefix(model, prompt, *rows)
    for question in QUESTIONS:
        torch.testing.assert_close(prefix, whole_prompt(model, prompt, rows, question)[: len(prefix)])
    assert len(prefix) == len(prompt.prefix_ids) + 14


def test_a_resampled_prefix_is_as_long_for_every_protein(model, rows, tokenizer):
    """And without the rows of an encoder, half as long."""
    resampling = ProteinGPT(Projector(6, 10, model.llm.config.hidden_size, "resampler", 4, 12), model.llm)
    prompt = Prompt(tokenizer, RELEASED, 100)
    front = len(prompt.prefix_ids)
    with torch.no_grad():
        for structure, sequence in (rows, (rows[0][:3], rows[1][:3])):
            prefix = protein_prefix(resampling, prompt, structure, sequence)
            assert len(prefix) == front + 8
            assert torch.equal(prefix[front:], resampling.projector([structure], [sequence]))
        assert len(protein_prefix(resampling, prompt, rows[0][:0], rows[1])) == front + 4


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


# ------------------------------------------------------------------------------------ many proteins, any LLM family


FAMILIES = ("llama", "mistral", "qwen2")
PROTEINS = {"short": 3, "long": 40, "middle": 11}  # residues


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(directory of a small LLM in float64, its tokenizer): rounding decides nothing."""
    texts = [*QUESTIONS, RELEASED.before, RELEASED.after, "helix strand coil YES NO 1234567890"] * 3
    directory = tmp_path_factory.mktemp(request.param)
    write_tiny_llm(directory, texts, family=request.param, width=32, vocab_size=300, seed=4, initializer_range=0.4)
    return directory, AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.fixture(scope="module")
def many(family):
    """(model, prompt, [Asked] of three proteins of unlike length with unlike questions)."""
    directory, tokenizer = family
    prompt = Prompt(tokenizer, RELEASED, 100)
    generator = torch.Generator().manual_seed(2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        llm = load_llm(str(directory), torch.float64)
        model = ProteinGPT(Projector(6, 10, llm.config.hidden_size).double(), llm).eval()
        asked = []
        for number, (name, length) in enumerate(PROTEINS.items()):
            structure = 3 * torch.randn(length + 2, 6, generator=generator)
            sequence = 3 * torch.randn(length + 2, 10, generator=generator)
            prefix = protein_prefix(model, prompt, structure, sequence)
            asked.append(Asked(name, prefix, [*QUESTIONS[number:], f"What of {name}?"]))
    return model, prompt, asked


def by_transformers(directory, prompt, prefix, question, **options) -> list[int]:
    """transformers' generate on one question: the new ids, the end's own included."""
    llm = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", local_files_only=True
    )
    words = llm.get_input_embeddings().weight
    embeddings = torch.cat([prefix, words[prompt.question_ids([question])[0]]])[None]
    mask = torch.ones(embeddings.shape[:2], dtype=torch.int64)
    end = prompt.tokenizer.eos_token_id
    ids = llm.generate(
        inputs_embeds=embeddings, attention_mask=mask, do_sample=False, eos_token_id=end, pad_token_id=end, **options
    )
    return ids[0].tolist()


def collected(llm, prompt, asked, decoding) -> list[list[int]]:
    ids = [[] for one in asked for _ in one.questions]
    for step in decode(llm, prompt, asked, decoding):
        for row, token in step:
            ids[row].append(token)
    return ids


def test_proteins_decoded_together_give_transformers_tokens_one_by_one(family, many):
    """Token for token, for each family, with prefixes and questions of unlike length in one batch."""
    model, prompt, asked = many
    together = collected(model.llm, prompt, asked, Decoding(24))
    alone = [
        by_transformers(family[0], prompt, one.prefix, question, max_new_tokens=24)
        for one in asked
        for question in one.questions
    ]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == theirs[: len(ours)]
        # Ours may end earlier, at the end symbol that transformers was not told of.
        assert len(ours) == len(theirs) or prompt.end_text in prompt.tokenizer.decode(ours)
    assert len({tuple(ids) for ids in together}) == len(together) > 8


def test_rows_that_end_leave_the_others_as_they_were(many):
    """A token that many rows say is made the end of all: the batch shrinks while it is decoded."""
    model, prompt, asked = many
    whole = collected(model.llm, prompt, asked, Decoding(24))
    for stop in sorted({ids[n] for ids in whole for n in (1, 3, 8) if n < len(ids)}):
        before, model.llm.config.eos_token_id = model.llm.config.eos_token_id, [stop]
        try:
            cut = collected(model.llm, prompt, asked, Decoding(24))
        finally:
            model.llm.config.eos_token_id = before
        assert cut == [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in whole]


def test_an_empty_question_behind_an_empty_text_goes_on_from_the_protein(family, many):
    """The form of stage align in the released code, where nothing stands between protein and answer; and without a
    protein, where nothing but BOS is left."""
    model, _, asked = many
    prompt = Prompt(family[1], TEMPLATES["released", "align"], 100)
    bare = model.llm.get_input_embeddings()(torch.tensor(prompt.prefix_ids))
    for batch in ([Asked("a", asked[0].prefix, [""]), Asked("b", bare, [""])], [Asked("b", bare, [""])]):
        got = collected(model.llm, prompt, batch, Decoding(8))
        for one, ours in zip(batch, got, strict=True):
            theirs = by_transformers(family[0], prompt, one.prefix, "", max_new_tokens=8)
            assert ours == theirs[: len(ours)] and ours


def test_a_streamed_answer_is_the_answer_in_pieces(many):
    model, prompt, asked = many
    for one in asked:
        whole = answer_batch(model.llm, prompt, [one], Decoding(24))[0]
        for question, text in zip(one.questions, whole, strict=True):
            pieces = list(stream(model.llm, prompt, Asked(one.name, one.prefix, [question]), Decoding(24)))
            assert "".join(pieces) == text


@pytest.mark.parametrize(
    "text, end, num",
    [("helix #", "###", 1), ("helix ##", "###", 2), ("helix", "###", 0), ("a###", "###", 3), ("", "#", 0)],
)
def test_what_may_be_an_end_symbol_waits(text, end, num):
    assert held_back(text, end) == num


# -------------------------------------------------------------------------------------------------------------- draws


def test_draws_depend_on_protein_and_question_and_not_on_the_batch(many):
    model, prompt, asked = many
    drawing = Decoding(12, temperature=1.0, top_p=0.9, seed=5)
    together = answer_batch(model.llm, prompt, asked, drawing)
    alone = [answer_batch(model.llm, prompt, [one], drawing)[0] for one in reversed(asked)][::-1]
    assert together == alone
    assert together != answer_batch(model.llm, prompt, asked, Decoding(12, temperature=1.0, top_p=0.9, seed=6))
    assert together != answer_batch(model.llm, prompt, asked, Decoding(12))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """Counted by hand: of 0.5, 0.3, 0.2 the nucleus of 0.7 holds the first two, 5 to 3."""
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).repeat(4000, 1)
    draws = [draw(Decoding(1, temperature=1.0), "p", str(i)) for i in range(4000)]
    counts = np.bincount(choose(logits, Decoding(1, temperature=1.0, top_p=0.7), draws), minlength=3) / 4000
    np.testing.assert_allclose(counts, [0, 5 / 8, 3 / 8], atol=0.03)
    assert set(choose(logits, Decoding(1, temperature=1e-4), draws)) == {1}


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_ways_of_decoding_are_refused(wrong):
    with pytest.raises(ValueError, match="wanted at least one token"):
        Decoding(**wrong)


# -------------------------------------------------------------------------------------------------- where turns end


@pytest.mark.parametrize(
    "eos, others, wanted",
    [
        ("</s>", [], ["</s>"]),  # LLaMA-2, Vicuna, Mistral
        ("<|end_of_text|>", ["<|eot_id|>"], ["<|end_of_text|>", "<|eot_id|>"]),  # LLaMA-3
        ("<|endoftext|>", ["<|im_end|>"], ["<|endoftext|>", "<|im_end|>"]),  # Qwen
    ],
)
def test_every_family_ends_at_its_own_tokens(family, eos, others, wanted):
    tokenizer = AutoTokenizer.from_pretrained(family[0], local_files_only=True)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in (eos, *others)])
    tokenizer.eos_token = eos
    prompt = Prompt(tokenizer, TEMPLATES["paper", "instruct"], 10)
    llm = load_llm(str(family[0]), torch.float32)
    llm.config.eos_token_id = None
    own = "<|endoftext|>"  # of the demo's tokenizer, and of many others
    assert stop_ids(prompt, llm) == set(tokenizer.convert_tokens_to_ids([*wanted, own]))
    for name in wanted:
        assert clean(f" helix{name} more", prompt) == "helix"


def test_what_the_configuration_calls_an_end_is_one(family):
    prompt = Prompt(family[1], TEMPLATES["paper", "instruct"], 10)
    llm = load_llm(str(family[0]), torch.float32)
    llm.config.eos_token_id = [7, 9]
    assert stop_ids(prompt, llm) == {7, 9, family[1].eos_token_id}


# ------------------------------------------------------------------------------------------------------------ batches


sizes = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 30)), min_size=1, max_size=30)


@given(sizes, st.integers(1, 50), st.integers(100, 50_000))
def test_batches_hold_every_protein_once_and_no_more_than_fits(proteins, more, most):
    lengths, questions = map(list, zip(*proteins))
    made = batches(lengths, questions, more, most)
    assert sorted(i for batch in made for i in batch) == list(range(len(proteins)))
    for batch in made:
        positions = sum(questions[i] for i in batch) * (max(lengths[i] for i in batch) + more)
        assert positions <= most or len(batch) == 1


def test_bytes_of_a_position_are_those_of_the_cache(family, many):
    model, prompt, asked = many
    llm = model.llm
    cache = llm(inputs_embeds=asked[0].prefix[None], use_cache=True, layout=make_layout([0, len(asked[0].prefix)],
                torch.zeros(len(asked[0].prefix), dtype=torch.int64))).past_key_values  # fmt: skip
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes_per_token(llm.config, torch.float64) * len(asked[0].prefix) == held
