"""The predictions of everyone who is compared, on disk: each rank answers its share of what is missing."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from proteingpt.config import DataConfig
from proteingpt.distributed import Rank, gather_objects, on_first_rank
from proteingpt.evaluation import asking, contestants
from proteingpt.evaluation.baselines import BlindGuess
from proteingpt.evaluation.cases import Case, Chosen, Shards, fits, missing_of, shown_protein
from proteingpt.evaluation.command import decoding_of, names_of, service_of
from proteingpt.evaluation.contestants import Neighbour, Share, Showing, Shown
from proteingpt.evaluation.predictions import EvaluationError, PredictionStore
from proteingpt.inference.generate import cache_bytes_per_token
from proteingpt.model import assemble

log = logging.getLogger("proteingpt")

CPU_CACHE_GIB, GPU_CACHE_SHARE = 1.0, 0.5
WITHOUT_MODEL = ("blind", "nearest", "chat")


@dataclass
class Evaluation:
    """What the steps of a run share. All ranks have the same."""

    args: argparse.Namespace
    rank: Rank
    device: torch.device
    out: Path
    data: DataConfig
    test: Shards
    train: Shards
    info: assemble.ModelInfo
    chosen: Chosen

    @property
    def cases(self) -> list[Case]:
        return self.chosen.cases

    @property
    def dtype(self) -> torch.dtype:
        return precision(self.device)

    def store(self, name: str) -> PredictionStore:
        return PredictionStore(self.out / "predictions" / name)

    def fitting(self, shown: Shown, cases: list[Case]) -> list[Case]:
        """Those that the LLM's context has room for, with what a contestant is shown."""
        context, new = assemble.context_length(shown.model.llm.config), self.args.max_new_tokens
        return [case for case in cases if fits(case, shown.prefix_tokens(case), context, new)]


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def find_nearest(evaluation: Evaluation) -> dict[str, Neighbour]:
    """The nearest training protein of each case; every rank looks for its share."""
    rank = evaluation.rank
    mine = evaluation.cases[rank.rank :: rank.world_size]
    found = contestants.nearest_training(mine, evaluation.test, evaluation.train)
    return {key: neighbour for part in gather_objects(found) for key, neighbour in part.items()}


def answer_all(evaluation: Evaluation, showing: Showing, near):
    """The predictions of every contestant, on disk."""
    args, data = evaluation.args, evaluation.data
    most = most_tokens(args, showing.model, evaluation.device)
    share = Share(evaluation.rank.rank, evaluation.rank.world_size, most)
    made_from = on_first_rank(lambda: {
        "model": contestants.directory_fingerprint(Path(args.model)),
        "data": [evaluation.test.fingerprint, args.split, evaluation.train.fingerprint],
        "asked": [args.proteins, args.questions, args.seed, len(evaluation.cases)],
        "long_proteins": [data.max_residues, data.long_proteins],
        "decoding": [args.max_new_tokens, args.temperature, args.top_p],
    })  # fmt: skip
    for name in names_of(args):
        store = evaluation.store(name)
        there = on_first_rank(lambda: begin(store, made_from | of_contestant(name, args)))
        if name in WITHOUT_MODEL:
            on_first_rank(
                lambda: answer_without_model(name, evaluation, store, missing_of(evaluation.cases, there), near)
            )
        else:
            shown, asked = shown_by(name, evaluation, showing)
            contestants.generate(name, store, there, asked, shown, decoding_of(args), share)
            gather_objects(None)  # the next contestant begins, and scores are made, once all ranks have written theirs
            on_first_rank(lambda: check_answered(name, store, asked))


def begin(store: PredictionStore, made_from: dict) -> set[tuple[str, int]]:
    """What was answered before. Read by one rank: others would meet what the quickest has added meanwhile."""
    store.open(made_from)
    return set(store.read())


def check_answered(name: str, store: PredictionStore, cases: list[Case]):
    """A file system that shows what other nodes wrote only later would cost answers in silence."""
    left = missing_of(cases, store.read())
    if left:
        raise EvaluationError(
            f"the answers of {name} to {len(left)} of {len(cases)} proteins are not in {store.directory}, though every "
            "rank has written its own: is it on a disk that all nodes share? The same command goes on from here"
        )


def of_contestant(name: str, args) -> dict:
    """What a contestant's predictions depend on beside what all share."""
    if name == "align":
        return {"align_model": contestants.directory_fingerprint(Path(args.align_model))}
    if name == "predicted":
        return {"predicted": contestants.shards_fingerprint(args.predicted)}
    return {"chat": [args.chat_endpoint, args.chat_model]} if name == "chat" else {}


def make_guess(evaluation: Evaluation) -> BlindGuess:
    turns = contestants.training_turns(evaluation.train, evaluation.info.stage)
    try:
        return BlindGuess(turns)
    except ValueError as error:
        raise EvaluationError(f"the training split of {evaluation.train.address} has {error}") from error


def most_tokens(args, model, device) -> int:
    """Cached positions that fit."""
    if args.cache_gib is not None:
        num_bytes = args.cache_gib * 2**30
    elif device.type == "cuda":
        num_bytes = GPU_CACHE_SHARE * torch.cuda.mem_get_info(device)[0]
    else:
        num_bytes = CPU_CACHE_GIB * 2**30
    return int(num_bytes / cache_bytes_per_token(model.llm.config, precision(device)))


def shown_by(name: str, evaluation: Evaluation, showing: Showing) -> tuple[Shown, list[Case]]:
    """(what the contestant is shown, the cases that it can be shown)."""
    args, cases = evaluation.args, evaluation.cases
    if name == "model":
        return showing.whole(), cases
    if name == "shuffled":
        shown = showing.shuffled(cases)
    elif name in ("no-protein", "structure-only", "sequence-only"):
        shown = showing.only(structure=name == "structure-only", sequence=name == "sequence-only")
    elif name == "align":
        shown = showing.whole(load_align_model(evaluation))
    elif name == "predicted":
        found = contestants.match_predicted(cases, evaluation.test, args.predicted)
        shown, cases = showing.predicted(found), [case for case in cases if case.key in found]
    else:
        assert name == "plain-llm", name
        shown = showing.as_text(
            contestants.plain_model(Path(args.model), showing.model, evaluation.dtype, evaluation.device)
        )
    return shown, evaluation.fitting(shown, cases)


def load_align_model(evaluation: Evaluation):
    directory, names = (
        evaluation.args.align_model,
        ("structure_width", "sequence_width", "esm2_fingerprint", "esm_if1_fingerprint"),
    )
    model, _, info = assemble.load_exported(Path(directory), evaluation.dtype, evaluation.device)
    other = [name for name in names if getattr(info, name) != getattr(evaluation.info, name)]
    if other:
        raise EvaluationError(
            f"--align-model: {directory} was trained with other encoders than {evaluation.args.model} "
            f"({', '.join(other)})"
        )
    return model


def answer_without_model(name: str, evaluation: Evaluation, store: PredictionStore, todo: list[Case], near):
    if not todo:
        return
    if name == "blind":
        store.append(0, contestants.answer_blind(todo, make_guess(evaluation)))
    elif name == "nearest":
        guess = make_guess(evaluation)
        store.append(0, contestants.answer_nearest(todo, near, evaluation.train, evaluation.info.stage, guess))
    else:
        answer_by_chat(evaluation, store, todo)


def answer_by_chat(evaluation: Evaluation, store: PredictionStore, todo: list[Case]):
    args, replies = evaluation.args, asking.Replies(evaluation.out / "replies.sqlite")
    form = asking.chat_form(args.chat_model, max(len(case.turns) for case in todo))
    asker = asking.Asker(service_of(args, "chat"), form, replies, args.max_usd)

    def work(case: Case):
        sequence = shown_protein(evaluation.test, case.number, evaluation.data).sequence
        return asking.chat_answers(asker, sequence, case.turns)

    answers = asker.run([lambda case=case: work(case) for case in todo])
    records = [
        case.records(dict(enumerate(said))) for case, said in zip(todo, answers, strict=True) if said is not None
    ]
    store.append(0, [record for group in records for record in group])
    unanswered = sum(said is None for said in answers)
    if unanswered:
        log.warning(
            "chat: %d of %d proteins got no usable answer; they are left out of its scores", unanswered, len(todo)
        )
    if not store.read():
        raise EvaluationError(f"{asker.client.name} gave no usable answer for any protein")
    replies.close()
