"""Token ids of a split's text, computed once and kept beside the shards, from where they are mapped into memory.

The plan needs every length beforehand, and tokenising is far slower than reading. The folder's name carries the hash of
shards, stage, template and tokenizer, so a change of any of them makes a new one. Tokenisers of the `tokenizers` library
run on all cores, and two threads read and collect around them; others run on one.
"""

import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proteingpt.data.prompts import Prompt, turns_of_stage
from proteingpt.data.shards import ShardSet
from proteingpt.protein import PrefixLength, prefix_length

BATCH = 1000  # samples tokenised in one call: enough for the tokenizer's threads, small enough for its memory
THREADS = 2  # that read, hand over to the tokenizer and collect; it works beside them, on threads of its own
# Files of an index: little-endian, nothing but the numbers.
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
    """Questions and answers of the S samples of a split. first_turn: int64 (S + 1,), where each sample's turns begin."""

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
    """(ids of the texts end to end, int32; length of each); a text that occurs often, as questions and short answers do,
    is tokenised once."""
    unique = list(dict.fromkeys(texts))
    ids = dict(zip(unique, (np.array(row, np.int32) for row in tokenise(unique)))) if unique else {}
    rows = [ids[text] for text in texts]
    return np.concatenate([np.zeros(0, np.int32), *rows]), np.fromiter(map(len, rows), np.int64, count=len(rows))


def make_batches(shards: ShardSet, stage: str, prompt: Prompt) -> Iterator[Batch]:
    """All samples, in order."""
    parts = [range(first, min(first + BATCH, len(shards))) for first in range(0, len(shards), BATCH)]
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


def write_index(batches: Iterable[Batch], directory: Path):
    """Batch by batch, so that an index of any size is built in the memory of a few."""
    totals = dict.fromkeys(("question_starts", "answer_starts", "first_turn"), 0)
    files = {name: open(directory / name, "wb") for name in COLUMNS}
    try:

        def append(name: str, lengths: np.ndarray):
            ends = totals[name] + np.cumsum(lengths, dtype=np.int64)
            files[name].write(ends.astype(COLUMNS[name]).tobytes())
            totals[name] = int(ends[-1]) if len(ends) else totals[name]

        for name in totals:
            append(name, np.zeros(1, np.int64))
        for batch in batches:
            for kind, (ids, lengths) in (("question", batch.questions), ("answer", batch.answers)):
                files[f"{kind}_ids"].write(ids.astype(COLUMNS[f"{kind}_ids"]).tobytes())
                append(f"{kind}_starts", lengths)
            append("first_turn", np.array(batch.num_turns, np.int64))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()


def load_index(directory: Path) -> TokenIndex:
    """Mapped into memory: what is not looked at is not read, and what is can be dropped again."""
    columns = {name: map_file(directory / name, dtype) for name, dtype in COLUMNS.items()}
    return TokenIndex(
        Tokens(columns["question_ids"], columns["question_starts"]),
        Tokens(columns["answer_ids"], columns["answer_starts"]),
        columns["first_turn"],
    )


def map_file(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # which cannot be mapped
    return np.asarray(np.memmap(path, dtype, mode="r"))


def build_index(shards: ShardSet, stage: str, prompt: Prompt) -> TokenIndex:
    """Without a place to keep it: in files that have no name any more, and go with the last that reads them."""
    with tempfile.TemporaryDirectory(prefix="tokens-") as directory:
        write_index(make_batches(shards, stage, prompt), Path(directory))
        return load_index(Path(directory))


def index_name(shards: ShardSet, stage: str, prompt: Prompt) -> str:
    """Name of the index: a hash of all it depends on. A tokenizer of `tokenizers` enters whole, another by its
    vocabulary."""
    tokenizer = prompt.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    identity = (shards.fingerprint, stage, prompt.template, prompt.max_answer_tokens, tokenizer.eos_token_id)
    described = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return f"tokens-{stage}-{hashlib.sha256(repr((identity, described)).encode()).hexdigest()[:16]}"


def open_index(shards: ShardSet, stage: str, prompt: Prompt, directory: Path) -> TokenIndex:
    """The index, from `directory` if it is there, else built and left there where the directory can be written."""
    path = Path(directory) / index_name(shards, stage, prompt)
    if path.is_dir():
        return load_index(path)
    if not os.access(directory, os.W_OK):
        return build_index(shards, stage, prompt)
    aside = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    aside.mkdir(exist_ok=True)
    try:
        write_index(make_batches(shards, stage, prompt), aside)
        os.rename(aside, path)
    except OSError:
        if not path.is_dir():  # else another run was first, with the same bytes
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return load_index(path)


# ------------------------------------------------------------------------------------------------ several as one


class Joined:
    """One-dimensional arrays end to end, where they lie, each with `shifts[part]` added to its values. Read by number, by
    a slice, or by an int array of numbers."""

    def __init__(self, parts: list[np.ndarray], shifts: list[int] | None = None):
        self.parts, self.shifts = parts, shifts or [0] * len(parts)
        self.starts = np.concatenate(([0], np.cumsum([len(part) for part in parts])))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, where):
        if isinstance(where, slice):
            return self._slice(*where.indices(len(self))[:2])
        part = np.searchsorted(self.starts, where, side="right") - 1
        if np.ndim(where) == 0:
            return self.parts[part][where - self.starts[part]] + self.shifts[part]
        found = np.empty(len(where), self.parts[0].dtype)
        for p in np.unique(part):
            chosen = part == p
            found[chosen] = self.parts[p][where[chosen] - self.starts[p]] + self.shifts[p]
        return found

    def _slice(self, first: int, last: int) -> np.ndarray:
        pieces = [
            part[max(0, first - start) : last - start] + part.dtype.type(shift)
            for part, start, shift in zip(self.parts, self.starts.tolist(), self.shifts)
            if start < last and first < start + len(part)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self.parts[0].dtype), *pieces])


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
    num_residues: np.ndarray,
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
    lengths = num_residues.astype(np.int64)
    if crop and max_residues is not None:
        lengths = np.minimum(lengths, max_residues)
    rows = prefix_length(lengths)
    fits = prefix_tokens + rows + longest_turns(index) <= context_length
    return fits if max_residues is None else fits & (lengths <= max_residues)


def longest_turns(index: TokenIndex) -> np.ndarray:
    """int64 (S,): tokens of each sample's longest question and answer, 0 of one without. In the memory of a few batches."""
    num_samples = len(index.first_turn) - 1
    longest = np.zeros(num_samples, np.int64)
    for first in range(0, num_samples, BATCH * 100):
        bounds = index.first_turn[first : min(first + BATCH * 100, num_samples) + 1]
        turns = np.arange(bounds[0], bounds[-1])
        tokens = np.append(index.questions.lengths_at(turns) + index.answers.lengths_at(turns), 0)
        most = np.maximum.reduceat(tokens, bounds[:-1] - bounds[0]) * (np.diff(bounds) > 0)
        longest[first : first + len(most)] = most
    return longest
