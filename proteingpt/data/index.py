"""Token ids of a split's text, computed once and kept beside the shards, from where they are mapped into memory.

The plan needs every length beforehand, and tokenising is far slower than reading. The folder's name has the hash of
shards, stage, template and tokenizer, so a change of any of them makes a new one. Tokenisers of the `tokenizers`
library run on all cores, and two threads read and collect around them; others run on one.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proteingpt.data.columns import Joined, Writer, made_once, pieces
from proteingpt.data.prompts import Prompt, turns_of_stage
from proteingpt.data.shards import ShardSet
from proteingpt.protein import PrefixLength, prefix_length

BATCH = 1000  # samples tokenised in one call: enough for the tokenizer's threads, small enough for its memory
THREADS = 2  # that read, hand over to the tokenizer and collect; it works beside them, on threads of its own
COLUMNS = {
    "question_ids": "<i4",
    "question_starts": "<i8",
    "answer_ids": "<i4",
    "answer_starts": "<i8",
    "first_turn": "<i8",
}


@dataclass(frozen=True)
class Tokens:
    """Ids of N texts end to end. ids: int32; starts: int64 (N + 1,)."""

    ids: "np.ndarray | Joined"
    starts: "np.ndarray | Joined"

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.starts[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts[0 : len(self.starts)])

    def lengths_at(self, numbers: np.ndarray) -> np.ndarray:
        """int64: tokens of some of the texts."""
        return self.starts[numbers + 1] - self.starts[numbers]


@dataclass(frozen=True)
class TokenIndex:
    """Questions and answers of the S samples of a split. first_turn: int64 (S + 1,), where the turns of each begin."""

    questions: Tokens
    answers: Tokens
    first_turn: "np.ndarray | Joined"

    @property
    def num_turns(self) -> np.ndarray:
        return np.diff(self.first_turn[0 : len(self.first_turn)])


# ------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class Batch:
    """Of some samples in a row: turns of each; and of the questions and of the answers the ids, int32, end to end, with
    the length of each."""

    num_turns: list[int]
    questions: tuple[np.ndarray, np.ndarray]
    answers: tuple[np.ndarray, np.ndarray]


def make_batch(shards: ShardSet, stage: str, prompt: Prompt, samples: range) -> Batch:
    turns = [turns_of_stage(stage, *shards.read_text(i)) for i in samples]
    questions = tokenise_once([turn.question for asked in turns for turn in asked], prompt.question_ids)
    answers = tokenise_once([turn.answer for asked in turns for turn in asked], prompt.answer_ids)
    return Batch([len(asked) for asked in turns], questions, answers)


def tokenise_once(texts: list[str], tokenise) -> tuple[np.ndarray, np.ndarray]:
    """(ids of the texts end to end, int32; length of each); a text that occurs often, as questions and short answers
    do, is tokenised once."""
    unique = list(dict.fromkeys(texts))
    ids = dict(zip(unique, (np.array(row, np.int32) for row in tokenise(unique)))) if unique else {}
    rows = [ids[text] for text in texts]
    return np.concatenate([np.zeros(0, np.int32), *rows]), np.fromiter(map(len, rows), np.int64, count=len(rows))


def make_batches(shards: ShardSet, stage: str, prompt: Prompt) -> Iterator[Batch]:
    """All samples, in order."""
    parts = (range(first, min(first + BATCH, len(shards))) for first in range(0, len(shards), BATCH))
    return in_order(lambda samples: make_batch(shards, stage, prompt, samples), parts, THREADS if prompt.is_bare else 1)


def in_order(make: Callable, items: Iterable, num_threads: int) -> Iterator:
    """make(item) of each, by so many threads, in order; no more are begun than there are threads to work on them."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_index(batches: Iterable[Batch], writer: Writer):
    """Batch by batch, so that an index of any size is built in the memory of a few."""
    for name in ("question_starts", "answer_starts", "first_turn"):
        writer.append_lengths(name, np.zeros(0, np.int64))  # a split without samples has these as well
    for batch in batches:
        for kind, (ids, lengths) in (("question", batch.questions), ("answer", batch.answers)):
            writer.append(f"{kind}_ids", ids)
            writer.append_lengths(f"{kind}_starts", lengths)
        writer.append_lengths("first_turn", np.array(batch.num_turns, np.int64))


def index_name(shards: ShardSet, stage: str, prompt: Prompt) -> str:
    """Name of the index: a hash of all it depends on. A tokenizer of `tokenizers` enters whole, another by its
    vocabulary."""
    tokenizer = prompt.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = (shards.fingerprint, stage, prompt.template, prompt.max_answer_tokens, tokenizer.eos_token_id)
    described = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return f"tokens-{stage}-{hashlib.sha256(repr((identity, described)).encode()).hexdigest()[:16]}"


def open_index(shards: ShardSet, stage: str, prompt: Prompt, directory: Path | None) -> TokenIndex:
    """The index, from `directory` if it is there, else built and left there where it can be written to. None: left
    nowhere."""
    path = None if directory is None else Path(directory) / index_name(shards, stage, prompt)
    columns = made_once(path, COLUMNS, lambda writer: write_index(make_batches(shards, stage, prompt), writer))
    questions, answers = (Tokens(columns[f"{kind}_ids"], columns[f"{kind}_starts"]) for kind in ("question", "answer"))
    return TokenIndex(questions, answers, columns["first_turn"])


def build_index(shards: ShardSet, stage: str, prompt: Prompt) -> TokenIndex:
    """Without a place to keep it."""
    return open_index(shards, stage, prompt, None)


# ------------------------------------------------------------------------------------------------ several as one


def join_indexes(indexes: list[TokenIndex]) -> TokenIndex:
    """The indexes of several sets, end to end, as one; nothing is copied."""
    if len(indexes) == 1:
        return indexes[0]
    questions, answers = (join_tokens([getattr(index, name) for index in indexes]) for name in ("questions", "answers"))
    return TokenIndex(questions, answers, join_starts([index.first_turn for index in indexes]))


def join_tokens(parts: list[Tokens]) -> Tokens:
    return Tokens(Joined([part.ids for part in parts]), join_starts([part.starts for part in parts]))


def join_starts(parts: list[np.ndarray]) -> Joined:
    """Of places that begin with 0 and end with the number of items; where two meet, the end of one is the other's 0."""
    ends = np.cumsum([0, *(int(part[-1]) for part in parts)]).tolist()
    return Joined([*(part[:-1] for part in parts[:-1]), parts[-1]], ends[:-1])


# ------------------------------------------------------------------------------------------------------- lengths


def usable(
    index: TokenIndex,
    num_residues: "np.ndarray | Joined",
    prefix_tokens: int,
    context_length: int,
    max_residues: int | None,
    prefix_length: PrefixLength = prefix_length,
    crop: bool = False,
) -> np.ndarray:
    """bool (S,): samples short enough for the model and for data.max_residues.

    A sample is as long as its longest question and answer behind its prefix; `prefix_tokens` counts BOS and the text in
    front of the protein. crop: proteins over max_residues are cut down to it.
    """
    keep = np.zeros(len(index.first_turn) - 1, bool)
    for part in pieces(len(keep)):
        lengths = num_residues[part].astype(np.int64)
        if crop and max_residues is not None:
            lengths = np.minimum(lengths, max_residues)
        fits = prefix_tokens + prefix_length(lengths) + longest_turns(index, part) <= context_length
        keep[part] = fits if max_residues is None else fits & (lengths <= max_residues)
    return keep


def longest_turns(index: TokenIndex, samples: slice) -> np.ndarray:
    """int64: tokens of the longest question and answer of each of the samples, 0 of one without."""
    bounds = index.first_turn[samples.start : samples.stop + 1]
    turns = np.arange(bounds[0], bounds[-1])
    tokens = np.append(index.questions.lengths_at(turns) + index.answers.lengths_at(turns), 0)
    return np.maximum.reduceat(tokens, bounds[:-1] - bounds[0]) * (np.diff(bounds) > 0)


def num_longer(num_residues: "np.ndarray | Joined", keep: np.ndarray, longest: int) -> int:
    """How many of the samples that are kept are longer than `longest` residues."""
    return sum(int((num_residues[part][keep[part]] > longest).sum()) for part in pieces(len(keep)))
