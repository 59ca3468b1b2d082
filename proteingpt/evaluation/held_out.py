"""Held-out loss and answers, over all ranks, for a model that may still be in training.

Every rank runs the same number of rounds, one protein each, and repeats in silence where there is none left: under
ZeRO 3 a forward is a collective.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from proteingpt.data import plan
from proteingpt.data.collate import collate
from proteingpt.data.loader import StageData
from proteingpt.data.prompts import Prompt, turns_of_stage
from proteingpt.distributed import gather_objects, sum_over_ranks
from proteingpt.encoders.pair import rows_of
from proteingpt.evaluation.metrics import accuracy
from proteingpt.inference.generate import answer


@dataclass(frozen=True)
class Prediction:
    key: str
    question: str
    answer: str
    prediction: str


@dataclass(frozen=True)
class HeldOut:
    """What is asked of whom: each protein with some of its turns. num_answered: how many of the proteins, from the
    first, are also decoded."""

    data: StageData
    stage: str
    prompt: Prompt
    groups: list[tuple[int, tuple[int, ...]]]
    num_answered: int
    max_new_tokens: int


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per answer token; accuracy: exact match after normalisation, None where nothing was decoded."""

    loss: float
    accuracy: float | None
    num_proteins: int
    predictions: list[Prediction]


def choose(
    data: StageData, seed: int, num_proteins: int, questions_per_protein: int
) -> list[tuple[int, tuple[int, ...]]]:
    """The same proteins at every evaluation and on any number of ranks: the first by a seeded hash of their keys."""
    order = np.argsort(plan.mix(data.ids, seed, 3), kind="stable")
    chosen = [int(sample) for sample in order if data.num_turns[sample] > 0][:num_proteins]
    return [(s, tuple(range(min(int(data.num_turns[s]), questions_per_protein)))) for s in chosen]


@torch.no_grad()
def evaluate(
    model, encoders, held_out: HeldOut, rank: int, world_size: int, device, in_step: bool,
    leave_early: Callable[[], bool] = lambda: False,
) -> Evaluation:  # fmt: skip
    """in_step: ZeRO 3 (see inference.generate.answer). The result is the same on every rank. leave_early: asked before
    each protein; an evaluation that was left is of what was asked until then."""
    was_training = model.training
    model.eval()
    loss_sum = num_tokens = 0.0
    predictions = []
    for first in range(0, len(held_out.groups), world_size):
        if leave_early():
            break
        mine = min(first + rank, len(held_out.groups) - 1)
        counts = first + rank < len(held_out.groups)
        group = held_out.data.group(*held_out.groups[mine])
        pack = collate([group]).to(device)
        structure_rows, sequence_rows = rows_of(pack, encoders, device)
        loss = float(model(pack, structure_rows, sequence_rows))
        if counts:
            loss_sum, num_tokens = loss_sum + loss, num_tokens + pack.num_answer_tokens
        if first < held_out.num_answered:
            answered = ask(model, held_out, mine, group, structure_rows[0], sequence_rows[0], in_step)
            if counts and first + rank < held_out.num_answered:
                predictions += answered
    model.train(was_training)
    total_loss, total_tokens = sum_over_ranks([loss_sum, num_tokens], device)
    predictions = sorted((p for ps in gather_objects(predictions) for p in ps), key=lambda p: (p.key, p.question))
    scored = accuracy([p.prediction for p in predictions], [p.answer for p in predictions]) if predictions else None
    return Evaluation(total_loss / max(1.0, total_tokens), scored, len(held_out.groups), predictions)


def ask(model, held_out: HeldOut, number: int, group, structure_rows, sequence_rows, in_step) -> list[Prediction]:
    sample, turn_numbers = held_out.groups[number]
    description, turns = held_out.data.shards.read_text(held_out.data.samples[sample])
    turns = turns_of_stage(held_out.stage, description, turns)
    asked = [turns[t] for t in turn_numbers]
    texts = answer(
        model,
        held_out.prompt,
        structure_rows,
        sequence_rows,
        [turn.question for turn in asked],
        max_new_tokens=held_out.max_new_tokens,
        in_step=in_step,
    )
    return [Prediction(group.key, turn.question, turn.answer, text) for turn, text in zip(asked, texts, strict=True)]
