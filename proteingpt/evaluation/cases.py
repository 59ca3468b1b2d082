"""What is asked: the held-out proteins with their questions, the same on any number of ranks.

Long proteins are treated as in training: shown whole, left out, or cut to their middle. What is left out, or cannot be
read, is named, so that the report can say so.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proteingpt.config import DataConfig
from proteingpt.data import plan
from proteingpt.data.crop import crop, window_start
from proteingpt.data.mixture import Mixture
from proteingpt.data.prompts import Prompt, turns_of_stage
from proteingpt.data.shards import ShardError, ShardSet
from proteingpt.evaluation.predictions import Record
from proteingpt.protein import Protein, Turn

log = logging.getLogger("proteingpt")

Shards = ShardSet | Mixture


@dataclass(frozen=True)
class Case:
    """A held-out protein with what is asked of it. number: in its shards; num_residues: of what the model is shown;
    question_tokens: of its longest question, as it stands in the prompt."""

    key: str
    number: int
    num_residues: int
    turns: tuple[Turn, ...]
    question_tokens: int = 0

    @property
    def wanted(self) -> list[tuple[str, int]]:
        return [(self.key, turn) for turn in range(len(self.turns))]

    def records(self, predictions: dict[int, str]) -> list[Record]:
        return [
            Record(self.key, turn, self.turns[turn].question, self.turns[turn].answer, text)
            for turn, text in predictions.items()
        ]


@dataclass(frozen=True)
class Chosen:
    """cases: in the order of a seeded hash of their keys. too_long, unreadable: keys of what was left out on the
    way."""

    cases: list[Case]
    too_long: list[str]
    unreadable: list[str]


def choose_cases(
    shards: Shards, stage: str, prompt: Prompt, seed: int, data: DataConfig = DataConfig(),
    num_proteins: int | None = None, num_questions: int | None = None,
) -> Chosen:  # fmt: skip
    """Those that have something to ask, the first `num_proteins` of them. data: what is done with long ones."""
    order = np.argsort(plan.mix(plan.hash_keys(list(shards.keys)), seed, 3), kind="stable")
    cases, too_long, unreadable = [], [], []
    for number in map(int, order):
        if num_proteins is not None and len(cases) == num_proteins:
            break
        key, num_residues = shards.keys[number], int(shards.num_residues[number])
        if data.long_proteins == "skip" and data.max_residues is not None and num_residues > data.max_residues:
            too_long.append(key)
            continue
        try:
            sample = shards.read(number)
        except ShardError as error:
            log.warning("left out: %s", error)
            unreadable.append(key)
            continue
        turns = turns_of_stage(stage, sample.description, sample.turns)[:num_questions]
        if turns:
            longest = max(map(len, prompt.question_ids([turn.question for turn in turns])))
            cases.append(Case(key, number, shown_residues(num_residues, data), turns, longest))
    return Chosen(cases, too_long, unreadable)


def shown_residues(num_residues: int, data: DataConfig) -> int:
    """How many of them the model is shown."""
    return min(num_residues, data.max_residues) if data.long_proteins == "crop" else num_residues


def shown_protein(shards: Shards, number: int, data: DataConfig) -> Protein:
    """As the model is shown it: of one that is to be cropped the middle, as in the evaluations of training."""
    protein = shards.read_protein(number)
    length = shown_residues(len(protein), data)
    if length == len(protein):
        return protein
    return crop(protein, window_start(len(protein), length, 0, None), length)


def fits(case: Case, prefix_tokens: int, context: int, max_new_tokens: int) -> bool:
    """Whether prefix, longest question and longest answer fit the LLM's context."""
    return prefix_tokens + case.question_tokens + max_new_tokens <= context


def set_of(shards: Shards, key: str) -> str | None:
    """The shard set that a protein of a mixture comes from; None where there is one set."""
    return (
        next((name for name in shards.names if key.startswith(f"{name}/")), None)
        if isinstance(shards, Mixture)
        else None
    )


def key_in_set(shards: Shards, key: str) -> str:
    """Its key without the name of its set."""
    return key.removeprefix(f"{set_of(shards, key)}/")


def missing_of(cases: Sequence[Case], there) -> list[Case]:
    """Cases of which at least one question is not answered in `there`, {(key, turn): ...}."""
    return [case for case in cases if any(wanted not in there for wanted in case.wanted)]
