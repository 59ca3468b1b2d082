"""Token ids of a split's text, computed once and kept beside the shards.

The plan needs every length beforehand, and tokenising is far slower than reading. The file's name carries the hash of
shards, stage, template and tokenizer, so a change of any of them makes a new file.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proteingpt.data.prompts import Prompt, turns_of_stage
from proteingpt.data.shards import ShardSet
from proteingpt.protein import prefix_length

BATCH = 1000  # samples tokenised in one call: enough for the tokenizer's threads, small enough for its memory


@dataclass(frozen=True)
class Tokens:
    """Ids of N texts end to end. ids: int32; starts: int64 (N + 1,)."""

    ids: np.ndarray
    starts: np.ndarray

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.starts[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @classmethod
    def of(cls, batches: list[list[np.ndarray]]) -> "Tokens":
        """From batches of rows of int32."""
        lengths = [np.fromiter(map(len, rows), np.int64, count=len(rows)) for rows in batches]
        starts = np.concatenate(([0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))))
        flat = [np.concatenate(rows) for rows in batches if rows]
        return cls(np.concatenate([np.zeros(0, np.int32), *flat]), starts)


@dataclass(frozen=True)
class TokenIndex:
    """Questions and answers of the S samples of a split. first_turn: int64 (S + 1,), where each sample's turns begin."""

    questions: Tokens
    answers: Tokens
    first_turn: np.ndarray

    @property
    def num_turns(self) -> np.ndarray:
        return np.diff(self.first_turn)


def build_index(shards: ShardSet, stage: str, prompt: Prompt) -> TokenIndex:
    questions, answers, num_turns = [], [], []
    for first in range(0, len(shards), BATCH):
        samples = [shards.read_text(i) for i in range(first, min(first + BATCH, len(shards)))]
        turns = [turns_of_stage(stage, description, asked) for description, asked in samples]
        num_turns += [len(t) for t in turns]
        questions.append(tokenise_once([turn.question for t in turns for turn in t], prompt.question_ids))
        answers.append(tokenise_once([turn.answer for t in turns for turn in t], prompt.answer_ids))
    first_turn = np.concatenate(([0], np.cumsum(num_turns, dtype=np.int64)))
    return TokenIndex(Tokens.of(questions), Tokens.of(answers), first_turn)


def tokenise_once(texts: list[str], tokenise) -> list[np.ndarray]:
    """Ids of each text, int32; a text that occurs often, as questions and short answers do, is tokenised once."""
    unique = list(dict.fromkeys(texts))
    ids = dict(zip(unique, (np.array(row, np.int32) for row in tokenise(unique)))) if unique else {}
    return [ids[text] for text in texts]


def index_name(shards: ShardSet, stage: str, prompt: Prompt) -> str:
    """File name of the index: a hash of all it depends on. A tokenizer of `tokenizers` enters whole, another by its
    vocabulary."""
    tokenizer = prompt.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = (shards.fingerprint, stage, prompt.template, prompt.max_answer_tokens, tokenizer.eos_token_id)
    described = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return f"tokens-{stage}-{hashlib.sha256(repr((identity, described)).encode()).hexdigest()[:16]}.npz"


def open_index(shards: ShardSet, stage: str, prompt: Prompt, directory: Path) -> TokenIndex:
    """The index, from `directory` if it is there, else built and left there where the directory can be written."""
    path = Path(directory) / index_name(shards, stage, prompt)
    if path.is_file():
        return load_index(path)
    index = build_index(shards, stage, prompt)
    if os.access(directory, os.W_OK):
        save_index(index, path)
    return index


def save_index(index: TokenIndex, path: Path):
    """Written aside and renamed: ranks that race here write the same bytes."""
    aside = path.with_name(f"{path.stem}.{os.uname().nodename}-{os.getpid()}.npz")
    np.savez(
        aside,
        question_ids=index.questions.ids,
        question_starts=index.questions.starts,
        answer_ids=index.answers.ids,
        answer_starts=index.answers.starts,
        first_turn=index.first_turn,
    )
    os.replace(aside, path)


def load_index(path: Path) -> TokenIndex:
    with np.load(path) as a:
        questions = Tokens(a["question_ids"], a["question_starts"])
        return TokenIndex(questions, Tokens(a["answer_ids"], a["answer_starts"]), a["first_turn"])


def usable(
    index: TokenIndex, num_residues: np.ndarray, prefix_tokens: int, context_length: int, max_residues: int | None
) -> np.ndarray:
    """bool (S,): samples short enough for the model and for data.max_residues.

    A sample is as long as its longest question and answer behind its prefix; `prefix_tokens` counts BOS and the text in
    front of the protein.
    """
    turn_lengths = index.questions.lengths + index.answers.lengths
    longest = np.zeros(len(num_residues), np.int64)
    sample = np.repeat(np.arange(len(num_residues)), index.num_turns)
    np.maximum.at(longest, sample, turn_lengths)
    fits = prefix_tokens + prefix_length(num_residues.astype(np.int64)) + longest <= context_length
    return fits if max_residues is None else fits & (num_residues <= max_residues)
