"""Held-out loss and greedy answers are those of the plain definition, on any number of ranks and under ZeRO 3."""

import dataclasses
import json
import shutil

import pytest
import torch
from small_run import SEED, Case, SmallRun, plain_question, zero_options
from transformers import AutoModelForCausalLM, AutoTokenizer

from proteingpt.data.shards import ShardSet
from proteingpt.demo.llm import write_tiny_llm
from proteingpt.evaluation.held_out import HeldOut, choose, evaluate
from proteingpt.inference.generate import EMPTY, answer

NUM_PROTEINS, NUM_QUESTIONS, NEW_TOKENS = 3, 5, 10


class Spelled:
    """Writes ids as <7><12>, so that equal texts are equal tokens, and any token can be an end symbol."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.eos_token = f"<{tokenizer.eos_token_id}>"

    def __call__(self, texts, **options):
        return self.tokenizer(texts, **options)

    def batch_decode(self, rows):
        return ["".join(f"<{int(token)}>" for token in row) for row in rows]


def held_out_of(run: SmallRun, end: str, num_answered: int = NUM_PROTEINS) -> HeldOut:
    """Three test proteins with five questions each; answers are decoded until `end`, and scored with the true one."""
    data = run.stage_data(ShardSet(run.case.assets, "test"))
    template = dataclasses.replace(run.prompt.template, end=end)
    prompt = dataclasses.replace(run.prompt, tokenizer=Spelled(run.prompt.tokenizer), template=template)
    return HeldOut(data, "instruct", prompt, choose(data, SEED, NUM_PROTEINS, NUM_QUESTIONS), num_answered, NEW_TOKENS)


# ------------------------------------------------------------------------------------------------ what ranks run


def evaluate_on_rank(rank, device, case: Case, end: str, num_answered: int = NUM_PROTEINS):
    run = SmallRun(case)
    engine = run.engine()
    result = evaluate(
        engine.module, run.encoders, held_out_of(run, end, num_answered), rank.rank, rank.world_size, device,
        in_step=engine.is_sharded,
    )  # fmt: skip
    still_training = engine.module.training
    engine.close()
    return result, still_training


def train_on_rank(rank, device, case: Case, end: str, evaluate_at: int | None):
    """Losses of six steps, with an evaluation among them or without."""
    run = SmallRun(case)
    engine = run.engine()
    held_out = held_out_of(run, end)

    def after_step(step: int):
        if step == evaluate_at:
            place = (rank.rank, rank.world_size, device)
            evaluate(engine.module, run.encoders, held_out, *place, in_step=engine.is_sharded)

    losses = run.train(engine, rank, device, after_step=after_step).losses
    engine.close()
    return losses


# ------------------------------------------------------------------------------------------- the plain definition


class Plain:
    """One question at a time: eager attention, no cache, no padding, argmax."""

    def __init__(self, case: Case):
        self.run = SmallRun(case)
        self.llm = AutoModelForCausalLM.from_pretrained(case.llm, dtype=torch.float32, attn_implementation="eager")
        self.projector = self.run.model().projector
        self.tokenizer = AutoTokenizer.from_pretrained(case.llm)

    @torch.no_grad()
    def loss(self, questions) -> float:
        parts = (self.llm, self.projector, self.tokenizer, self.run)
        terms = [plain_question(*parts, *question) for question in questions]
        return float(sum(term for term, _ in terms)) / sum(count for _, count in terms)

    @torch.no_grad()
    def greedy(self, protein, question: str) -> list[int]:
        """The next NEW_TOKENS ids, whatever they are."""
        (structure,), (sequence,) = self.run.encoders.encode([protein])

        def embed(ids):
            return self.llm.get_input_embeddings().weight[ids]

        def ids(text):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        projector = self.projector
        known = torch.cat(
            [
                embed([self.tokenizer.bos_token_id, *ids("###Human: <protein>")]),
                structure @ projector.structure.weight.T + projector.structure.bias,
                sequence @ projector.sequence.weight.T + projector.sequence.bias,
                embed(ids(f"</protein> {question} ###Assistant: ")),
            ]
        )
        chosen = []
        for _ in range(NEW_TOKENS):
            logits = self.llm(inputs_embeds=torch.cat([known, embed(chosen)])[None], use_cache=False).logits
            chosen.append(int(logits[0, -1].argmax()))
        return chosen


def until(ids: list[int], *ends: int) -> str:
    """Spelled, up to the first of `ends`; EMPTY where nothing is left."""
    stop = min([ids.index(end) for end in ends if end in ids], default=len(ids))
    return "".join(f"<{token}>" for token in ids[:stop]) or EMPTY


@pytest.fixture(scope="module")
def case(demo_assets, tmp_path_factory):
    """Embeddings that are not tied and large weights: tied, a random model repeats its last token for ever."""
    directory = tmp_path_factory.mktemp("mistral")
    write_tiny_llm(
        directory, ["helix strand coil"], family="mistral", seed=5, width=32, vocab_size=280, initializer_range=0.5
    )
    return Case(str(demo_assets), str(directory), "full")


@pytest.fixture(scope="module")
def plain(case):
    return Plain(case)


@pytest.fixture(scope="module")
def asked(case):
    """(key, protein, turn) of each question: the first questions of each chosen protein."""
    shards = ShardSet(case.assets, "test")
    chosen = held_out_of(SmallRun(case), "").groups
    assert len(chosen) == NUM_PROTEINS
    return [(shards.keys[s], shards.read(s).protein, shards.read_text(s)[1][t]) for s, turns in chosen for t in turns]


@pytest.fixture(scope="module")
def free(plain, asked):
    """What greedy decoding says, unstopped, by (key, question)."""
    return {(key, turn.question): plain.greedy(protein, turn.question) for key, protein, turn in asked}


@pytest.fixture(scope="module")
def end_id(free):
    """A token that ends some answers early and others not at all, so that rows and ranks stop at different times."""
    for token in sorted({token for ids in free.values() for token in ids[1:-2]}):
        stops = [ids.index(token) if token in ids else None for ids in free.values()]
        if None in stops and len(set(stops)) > 2:
            return token
    raise AssertionError("no token ends answers at different places: choose another seed for the LLM")


def test_the_random_model_says_different_things(free):
    """Or equal answers would prove little."""
    assert len({tuple(ids) for ids in free.values()}) > len(free) / 2


@pytest.mark.parametrize("zero, ranks", [("zero0", 1), ("zero0", 2), ("zero2", 2), ("zero3", 1), ("zero3", 2)])
def test_loss_and_answers_are_those_of_the_plain_definition(worlds, case, plain, asked, free, end_id, zero, ranks):
    """Token for token, and the same on every rank. Two ranks have three proteins, so one repeats in silence."""
    results = worlds(ranks)(evaluate_on_rank, dataclasses.replace(case, zero=zero_options(zero)), f"<{end_id}>")
    result = results[0][0]
    assert all(other == result and still_training for other, still_training in results)
    assert result.loss == pytest.approx(plain.loss([(protein, turn) for _, protein, turn in asked]), rel=1e-6)
    assert result.num_proteins == NUM_PROTEINS
    eos = plain.tokenizer.eos_token_id
    found = {(p.key, p.question): p.prediction for p in result.predictions}
    assert found == {key: until(ids, end_id, eos) for key, ids in free.items()}
    assert len(result.predictions) == len(asked) == NUM_PROTEINS * NUM_QUESTIONS
    true = {(key, turn.question): turn.answer for key, _, turn in asked}
    assert {(p.key, p.question): p.answer for p in result.predictions} == true


@pytest.mark.parametrize("num_answered", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2])
def test_only_the_first_proteins_are_decoded(worlds, case, asked, end_id, ranks, num_answered):
    result = worlds(ranks)(evaluate_on_rank, case, f"<{end_id}>", num_answered)[0][0]
    keys = list(dict.fromkeys(key for key, _, _ in asked))
    assert {prediction.key for prediction in result.predictions} == set(keys[:num_answered])
    assert result.num_proteins == NUM_PROTEINS
    assert (result.accuracy is None) == (num_answered == 0)


@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_an_evaluation_in_the_middle_does_not_change_the_training(worlds, case, end_id, zero):
    case = dataclasses.replace(case, zero=zero_options(zero))
    with_one, without = (worlds(2)(train_on_rank, case, f"<{end_id}>", at)[0] for at in (2, None))
    assert with_one == without and len(without) == 6


def test_an_llms_own_habits_of_decoding_do_not_enter(case, asked, free, plain, tmp_path):
    """A chat model's repetition penalty, sampling or minimal length would make the answer other than greedy."""
    directory = shutil.copytree(case.llm, tmp_path / "llm")
    habits = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 5}
    habits |= {"do_sample": True, "temperature": 9.0, "eos_token_id": [5, 6]}
    (directory / "generation_config.json").write_text(json.dumps(habits))
    run = SmallRun(dataclasses.replace(case, llm=str(directory)))
    model, prompt = run.model(), held_out_of(run, "<none>").prompt
    protein = asked[0][1]
    questions = [turn.question for key, _, turn in asked if key == asked[0][0]]
    (structure,), (sequence,) = run.encoders.encode([protein])
    found = answer(model, prompt, structure, sequence, questions, max_new_tokens=NEW_TOKENS)
    assert found == [until(free[asked[0][0], question], plain.tokenizer.eos_token_id) for question in questions]
