"""Who answers: the model, and what it is compared with. Each leaves the same files of predictions.

What the model is shown is varied (another protein, none, one of its two halves, a predicted structure), or another
answers in its place: a blind majority, the nearest training protein, the plain LLM, the model after stage 1, a chat
model. """

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from proteingpt.config import DataConfig
from proteingpt.data.prompts import Prompt, turns_of_stage
from proteingpt.data.set_aside import readable_texts
from proteingpt.data.shards import ShardError, ShardSet, read_manifest
from proteingpt.evaluation.baselines import BlindGuess
from proteingpt.evaluation.cases import Case, Shards, key_in_set, missing_of, shown_protein, shown_residues
from proteingpt.evaluation.neighbours import Neighbour, Neighbours
from proteingpt.evaluation.predictions import EvaluationError, PredictionStore, Record
from proteingpt.inference.generate import Asked, Decoding, answer_batch, batches, protein_prefix
from proteingpt.model import assemble, lora
from proteingpt.model.protein_gpt import ProteinGPT
from proteingpt.protein import ENCODER_EXTRA_ROWS, UNKNOWN_RESIDUE, Protein, Turn

log = logging.getLogger("proteingpt")

TITLES = {
    "model": "the model",
    "blind": "blind: the commonest training answer",
    "nearest": "nearest training protein's answer",
    "shuffled": "the model, shown another protein",
    "no-protein": "the model, shown no protein",
    "structure-only": "the model, structure alone",
    "sequence-only": "the model, sequence alone",
    "plain-llm": "the plain LLM, sequence as text",
    "align": "after stage 1 only",
    "predicted": "the model, predicted structures",
    "chat": "chat model, sequence as text",
}
# What each needs beside model and shards.
NEEDS = {"align": "--align-model", "predicted": "--predicted", "chat": "--chat-endpoint and --chat-model"}
USUAL = ("blind", "nearest", "shuffled")
LINE_EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Shown:
    """A model with its prompt, and what stands for the protein in it. prefix: case -> (P, width) embeddings.
    prefix_tokens: case -> P, known before anything is encoded."""

    model: ProteinGPT
    prompt: Prompt
    prefix: Callable[[Case], torch.Tensor]
    prefix_tokens: Callable[[Case], int]


def partners(cases: Sequence[Case]) -> dict[str, Case]:
    """Another protein for each: the next in the hash order of the cases, so that none is its own."""
    if len(cases) < 2:
        raise EvaluationError("shuffled needs at least two proteins to exchange")
    return {case.key: cases[(i + 1) % len(cases)] for i, case in enumerate(cases)}


# ------------------------------------------------------------------------------------------------ shown to the model


class Showing:
    """What the model can be shown of the proteins of a split. encode: [protein] -> (structure rows, sequence rows)."""

    def __init__(
        self, shards: Shards, data: DataConfig, encoders, model: ProteinGPT, prompt: Prompt,
        rows_of_part: tuple[bool, bool],
    ):  # fmt: skip
        """data: what is done with long proteins. rows_of_part: whether there is a structure encoder, a sequence
        encoder."""
        self.shards, self.data, self.encoders, self.model, self.prompt = shards, data, encoders, model, prompt
        self.parts = rows_of_part

    def protein(self, case: Case) -> Protein:
        return shown_protein(self.shards, case.number, self.data)

    def rows(self, protein: Protein):
        (structure,), (sequence,) = self.encoders.encode([protein])
        return structure, sequence

    def tokens(
        self, structure_residues: int | None, sequence_residues: int | None, model: ProteinGPT | None = None
    ) -> int:
        """Positions of a prefix; None leaves a part out."""
        positions = (model or self.model).projector.positions
        both = zip((structure_residues, sequence_residues), self.parts)
        lengths = [positions(n + ENCODER_EXTRA_ROWS) for n, there in both if there and n is not None]
        return len(self.prompt.prefix_ids) + sum(lengths)

    def _shown(self, model, rows, tokens) -> Shown:
        return Shown(model, self.prompt, lambda case: protein_prefix(model, self.prompt, *rows(case)), tokens)

    def whole(self, model: ProteinGPT | None = None) -> Shown:
        def tokens(case):
            return self.tokens(case.num_residues, case.num_residues, model)

        return self._shown(model or self.model, lambda case: self.rows(self.protein(case)), tokens)

    def shuffled(self, cases: Sequence[Case]) -> Shown:
        other, whole = partners(cases), self.whole()
        return replace(
            whole,
            prefix=lambda case: whole.prefix(other[case.key]),
            prefix_tokens=lambda case: whole.prefix_tokens(other[case.key]),
        )

    def only(self, structure: bool, sequence: bool) -> Shown:
        def rows(case):
            mine = self.rows(self.protein(case))
            return tuple(part if shown else part[:0] for part, shown in zip(mine, (structure, sequence), strict=True))

        def tokens(case):
            return self.tokens(case.num_residues if structure else None, case.num_residues if sequence else None)

        return self._shown(self.model, rows, tokens)

    def predicted(self, found: dict[str, tuple[Shards, int]]) -> Shown:
        """Structure rows of the predicted model, sequence rows of the deposited chain."""

        def rows(case):
            predicted = shown_protein(*found[case.key], self.data)
            # Under a name of its own: encoders remember a protein's rows by its key, which may be the deposited one's.
            return self.rows(replace(predicted, id=f"predicted/{predicted.id}"))[0], self.rows(self.protein(case))[1]

        def tokens(case):
            shards, number = found[case.key]
            return self.tokens(shown_residues(int(shards.num_residues[number]), self.data), case.num_residues)

        return self._shown(self.model, rows, tokens)

    def as_text(self, model: ProteinGPT) -> Shown:
        """The letters of the sequence in the place of the protein's rows."""

        def ids(case) -> list[int]:
            return self.prompt.prefix_ids + self.prompt.tokenise([self.protein(case).sequence])[0]

        words = model.llm.get_input_embeddings()
        device = words.weight.device
        return Shown(
            model, self.prompt, lambda case: words(torch.tensor(ids(case), device=device)), lambda case: len(ids(case))
        )


def match_predicted(cases: Sequence[Case], shards: Shards, directory: str) -> dict[str, tuple[ShardSet, int]]:
    """{case key: where its predicted structure is}: of the same key, else of exactly the same sequence."""
    by_key, by_sequence = {}, {}
    for split in read_manifest(directory)["splits"]:
        predicted = ShardSet(directory, split)
        for number, key in enumerate(predicted.keys):
            by_key[key] = (predicted, number)
            by_sequence.setdefault(predicted.read_protein(number).sequence, (predicted, number))
    found = {}
    for case in cases:
        place = by_key.get(key_in_set(shards, case.key)) or by_sequence.get(shards.read_protein(case.number).sequence)
        if place:
            found[case.key] = place
    if not found:
        raise EvaluationError(
            f"--predicted: none of the {len(cases)} proteins asked about is in {directory}, by key or by sequence; "
            "build those shards with ids and chains like the experimental ones"
        )
    return found


def shards_fingerprint(directory: str) -> list[str]:
    return [ShardSet(directory, split).fingerprint for split in read_manifest(directory)["splits"]]


def plain_model(directory: Path, model: ProteinGPT, dtype, device) -> ProteinGPT:
    """The LLM as it was before training: the model's own where that was frozen."""
    if not any((directory / part).is_dir() for part in ("llm", lora.ADAPTER)):
        return model
    llm = assemble.load_llm(assemble.read_info(directory).llm, dtype).eval().requires_grad_(False).to(device)
    return ProteinGPT(model.projector, llm)


# ----------------------------------------------------------------------------------------------------------- answering


@dataclass(frozen=True)
class Share:
    """This rank among all, and how many cached positions it decodes at once."""

    rank: int
    world_size: int
    max_tokens: int


@torch.no_grad()
def generate(
    name: str, store: PredictionStore, there: Collection[tuple[str, int]], cases: Sequence[Case], shown: Shown,
    decoding: Decoding, share: Share,
):  # fmt: skip
    """This rank's part of what is missing. there: what was answered when all began, the same on every rank. What this
    rank answers is on disk after each batch."""
    mine = missing_of(cases, there)[share.rank :: share.world_size]
    if not mine:
        return
    lengths = [shown.prefix_tokens(case) for case in mine]
    more = decoding.max_new_tokens + max(case.question_tokens for case in mine)
    progress = Progress(name, len(mine), share.rank == 0)
    for batch in batches(lengths, [len(case.turns) for case in mine], more, share.max_tokens):
        chosen = [mine[i] for i in batch]
        left = [[turn for turn in range(len(case.turns)) if (case.key, turn) not in there] for case in chosen]
        asked = [
            Asked(case.key, shown.prefix(case), [case.turns[turn].question for turn in turns])
            for case, turns in zip(chosen, left, strict=True)
        ]
        answers = answer_batch(shown.model.llm, shown.prompt, asked, decoding)
        records = [
            case.records(dict(zip(turns, texts, strict=True)))
            for case, turns, texts in zip(chosen, left, answers, strict=True)
        ]
        store.append(share.rank, [record for group in records for record in group])
        progress.add(len(chosen), sum(map(len, left)))


class Progress:
    """One line on stderr: rank 0's part stands for all."""

    def __init__(self, name: str, num_proteins: int, enabled: bool):
        self.name, self.num_proteins, self.enabled = name, num_proteins, enabled
        self.begun, self.shown, self.proteins, self.questions = time.monotonic(), 0.0, 0, 0

    def add(self, proteins: int, questions: int):
        self.proteins, self.questions = self.proteins + proteins, self.questions + questions
        now, terminal = time.monotonic(), sys.stderr.isatty()
        last = self.proteins == self.num_proteins
        if not self.enabled or not (last or terminal or now - self.shown >= LINE_EVERY_SECONDS):
            return
        self.shown = now
        seconds = max(now - self.begun, 1e-9)
        left = seconds / self.proteins * (self.num_proteins - self.proteins)
        line = (
            f"{self.name}: {self.proteins}/{self.num_proteins} proteins, {self.questions / seconds:,.1f} questions/s, "
            f"{left:.0f} s left"
        )
        end = "\r" if terminal and not last else "\n"
        print(f"\x1b[2K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ from training data


def training_turns(shards: Shards, stage: str) -> Iterator[Turn]:
    return (turn for texts in readable_texts(shards) for turn in turns_of_stage(stage, *texts))


def answer_blind(cases: Sequence[Case], guess: BlindGuess) -> list[Record]:
    return [
        record
        for case in cases
        for record in case.records({turn: guess(asked.question) for turn, asked in enumerate(case.turns)})
    ]


def answer_nearest(
    cases: Sequence[Case], near: dict[str, Neighbour], train: Shards, stage: str, guess: BlindGuess
) -> list[Record]:
    """What the nearest training protein answers to the very question; where it was not asked, the blind guess."""
    records = []
    for case in cases:
        neighbour = near[case.key]
        turns = turns_of_stage(stage, *train.read_text(neighbour.index)) if neighbour.index >= 0 else ()
        known = {turn.question: turn.answer for turn in reversed(turns)}
        texts = {i: known[t.question] if t.question in known else guess(t.question) for i, t in enumerate(case.turns)}
        records += case.records(texts)
    return records


def nearest_training(cases: Sequence[Case], test: Shards, train: Shards) -> dict[str, Neighbour]:
    """By the whole sequences, whatever the model is shown of them."""
    index = Neighbours([sequence_of(train, i) for i in range(len(train))])
    return {case.key: index.nearest(sequence_of(test, case.number)) for case in cases}


def sequence_of(shards: Shards, number: int) -> str:
    """Of one that cannot be read, which is nobody's neighbour, an unknown residue."""
    try:
        return shards.read_protein(number).sequence
    except ShardError as error:
        log.warning("left out: %s", error)
        return UNKNOWN_RESIDUE


def directory_fingerprint(directory: Path) -> str:
    """sha256 over the weights and the settings of an exported model."""
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.json"), *directory.rglob("*.safetensors")]):
        digest.update(path.relative_to(directory).as_posix().encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
