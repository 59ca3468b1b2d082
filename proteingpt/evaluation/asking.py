"""What is asked of OpenAI-compatible endpoints: a judge's marks, a chat model's answers, embeddings.

Every reply is kept in one SQLite file beside the report, so nothing is paid for twice, and the bound in dollars holds
over all runs into that report. What an endpoint does not answer usably is counted, never scored as zero. """

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from proteingpt.endpoint import (
    Client,
    Endpoint,
    EndpointError,
    Form,
    InvalidAnswer,
    Ledger,
    OutOfBudget,
    RequestFailed,
    RequestRefused,
    make_prices,
    make_usd,
    read_key,
)
from proteingpt.evaluation.predictions import EvaluationError
from proteingpt.protein import Turn

RUBRIC_FILE = Path(__file__).with_name("judge_rubric.txt")
RUBRIC_FIELDS = ("question", "answer", "prediction")
NUM_THREADS = 8
NUM_TRIES = 2  # of an answer that cannot be used
TEXTS_PER_REQUEST = 32  # of embeddings, whose replies are large
TOKENS_PER_ANSWER, TOKENS_PER_MARK = 120, 300
HIGHEST_MARK = 10

JUDGE = "You mark answers about proteins against the true answer, and reply with JSON."
JUDGE_SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer"}, "reason": {"type": "string"}},
    "required": ["score", "reason"],
    "additionalProperties": False,
}
CHAT = (
    "You answer questions about a protein of the Protein Data Bank from its sequence, and reply with JSON. Answer as "
    "the database would: YES or NO, a number alone, or a name alone, and in a sentence only where the question asks "
    "for one. Give your best guess where you are not sure."
)
CHAT_SCHEMA = {
    "type": "object",
    "properties": {"answers": {"type": "array", "items": {"type": "string"}}},
    "required": ["answers"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Service:
    """Where a kind of request goes. kind: judge, chat or embedding, as its settings are called. prices: in US dollars
    per 1,000 tokens read and written, as text; None where it costs nothing."""

    kind: str
    url: str
    model: str
    prices: tuple[str, str] | None = None
    key_variable: str | None = None

    def endpoint(self, kind_of_endpoint=Endpoint, **options) -> Endpoint:
        try:
            return kind_of_endpoint(self.url, read_key(self.key_variable, os.environ), **options)
        except EndpointError as error:
            raise self.error(error) from error

    def error(self, error: Exception) -> EvaluationError:
        return EvaluationError(str(error).replace("--qa-endpoint", f"--{self.kind}-endpoint"))


@dataclass(frozen=True)
class EmbeddingEndpoint(Endpoint):
    @property
    def address(self) -> str:
        url = self.url.rstrip("/")
        return url if url.endswith("/embeddings") else f"{url}/embeddings"


class Replies:
    """What was asked before, on disk: {key: bytes}, and what it has cost. For one process, with threads."""

    def __init__(self, path: Path):
        self.lock = threading.Lock()
        self.base = sqlite3.connect(path, check_same_thread=False)
        with self.lock, self.base:
            self.base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, value BLOB)")
            self.base.execute("CREATE TABLE IF NOT EXISTS spent (usd TEXT)")

    def get(self, key: str) -> bytes | None:
        with self.lock:
            row = self.base.execute("SELECT value FROM replies WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, values: Mapping[str, bytes]):
        with self.lock, self.base:
            self.base.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", list(values.items()))

    @property
    def spent_usd(self) -> Decimal:
        with self.lock:
            return sum((Decimal(usd) for (usd,) in self.base.execute("SELECT usd FROM spent")), Decimal(0))

    def add_spent(self, usd: Decimal):
        with self.lock, self.base:
            self.base.execute("INSERT INTO spent VALUES (?)", (str(usd),))

    def close(self):
        self.base.close()


def key_of(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Asker:
    """A client of one service with its memory."""

    def __init__(self, service: Service, form: Form, replies: Replies, max_usd: str | None, **endpoint_options):
        self.service, self.form, self.replies = service, form, replies
        try:
            prices = make_prices(*(service.prices or (None, None)))
            bound = None if max_usd is None else make_usd(max_usd, "--max-usd")
        except EndpointError as error:
            raise EvaluationError(f"--{service.kind}-prices or --max-usd: {error}") from error
        if bound is not None and prices is None:
            raise EvaluationError(f"--max-usd is a bound only with prices: give --{service.kind}-prices INPUT,OUTPUT")
        self.ledger = Ledger(prices, bound, replies.spent_usd)
        self.noted_usd, self.noting = self.ledger.spent_usd, threading.Lock()
        endpoint = service.endpoint(EmbeddingEndpoint if service.kind == "embedding" else Endpoint, **endpoint_options)
        self.client = Client(endpoint, form, self.ledger)

    def run(self, works: Sequence[Callable[[], object]]) -> list:
        """The values of all works, by threads. What ends one for good ends all, and what was paid is written down."""
        try:
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                futures = [pool.submit(work) for work in works]
                try:
                    return [future.result() for future in futures]
                except BaseException:
                    self.client.stopping.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        except OutOfBudget as error:
            raise EvaluationError(
                f"--max-usd is reached: {self.ledger.spent_usd:.4f} dollars spent in all; what was answered is kept, "
                "so the same command with a larger bound goes on from here"
            ) from error
        except EndpointError as error:
            raise self.service.error(error) from error
        finally:
            self.note_spent()

    def note_spent(self):
        """On disk after each request, since a run may be killed and its bound holds for the next one too."""
        with self.noting:
            spent = self.ledger.spent_usd
            if spent != self.noted_usd:
                self.replies.add_spent(spent - self.noted_usd)
                self.noted_usd = spent

    def answer(self, prompt: str, read: Callable[[object], object]) -> object | None:
        """The reply's JSON as `read` makes of it; None where the model gives none that can be used.

        read raises InvalidAnswer.
        """
        key = key_of(self.service.kind, self.form.model, self.form.system_message, prompt)
        kept = self.replies.get(key)
        if kept is not None:
            return read(json.loads(kept))
        for _ in range(NUM_TRIES):
            try:
                content = self.client.complete(prompt, [])
                value = read(parse(content))
            except (InvalidAnswer, RequestFailed):
                continue
            finally:
                self.note_spent()
            self.replies.put({key: json.dumps(parse(content)).encode()})
            return value
        return None


def parse(content: str) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidAnswer("the answer is not JSON") from error


# ------------------------------------------------------------------------------------------------------------- judge


def read_rubric(path: str | None) -> str:
    """A text with {question}, {answer} and {prediction} in it; braces of its own are doubled."""
    file = Path(path) if path else RUBRIC_FILE
    try:
        rubric = file.read_text(encoding="utf-8")
        rubric.format(**dict.fromkeys(RUBRIC_FIELDS, ""))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise EvaluationError(f"--judge-rubric: {file} cannot be used: {error}") from error
    absent = [f"{{{name}}}" for name in RUBRIC_FIELDS if f"{{{name}}}" not in rubric]
    if absent:
        raise EvaluationError(f"--judge-rubric: {file} lacks {', '.join(absent)}, where the texts are to stand")
    return rubric


def read_mark(value) -> float:
    score = value.get("score") if isinstance(value, dict) else None
    if type(score) is not int or not 0 <= score <= HIGHEST_MARK:
        raise InvalidAnswer(f"wanted a score from 0 to {HIGHEST_MARK}")
    return score / HIGHEST_MARK


def judge(
    asker: Asker, rubric: str, triples: Sequence[tuple[str, str, str]]
) -> dict[tuple[str, str, str], float | None]:
    """{(question, answer, prediction): 0 to 1}, None where the judge gave no mark."""
    unique = sorted(set(triples))
    prompts = [rubric.format(**dict(zip(RUBRIC_FIELDS, triple, strict=True))) for triple in unique]
    marks = asker.run([lambda prompt=prompt: asker.answer(prompt, read_mark) for prompt in prompts])
    return dict(zip(unique, marks, strict=True))


def judge_form(model: str) -> Form:
    return Form(model, JUDGE, "mark", JUDGE_SCHEMA, TOKENS_PER_MARK)


# -------------------------------------------------------------------------------------------------------------- chat


def chat_prompt(sequence: str, turns: Sequence[Turn]) -> str:
    questions = "\n".join(
        f"{number}. {turn.question or 'Describe this protein.'}" for number, turn in enumerate(turns, 1)
    )
    return (
        f"Sequence of the chain, {len(sequence)} residues, one letter each:\n{sequence}\n\n"
        f"{len(turns)} questions:\n{questions}\n\n"
        'Reply with JSON of the form {"answers": ["...", ...]}, one answer for each question, in their order.'
    )


def chat_form(model: str, most_questions: int) -> Form:
    return Form(model, CHAT, "answers", CHAT_SCHEMA, TOKENS_PER_ANSWER * most_questions + TOKENS_PER_ANSWER)


def chat_answers(asker: Asker, sequence: str, turns: Sequence[Turn]) -> list[str] | None:
    """As many answers as turns, from the sequence as text; None where the model gives none that can be used."""

    def read(value) -> list[str]:
        answers = value.get("answers") if isinstance(value, dict) else None
        if not isinstance(answers, list) or len(answers) != len(turns):
            raise InvalidAnswer(f"wanted {len(turns)} answers")
        return [str(answer) for answer in answers]

    return asker.answer(chat_prompt(sequence, turns), read)


# --------------------------------------------------------------------------------------------------------- embeddings


def embedding_form(model: str) -> Form:
    return Form(model, "", "", {}, 0)


def endpoint_embedder(asker: Asker) -> Callable[[list[str]], np.ndarray]:
    """texts -> float32 (N, width), by requests of the protocol's /embeddings. EvaluationError where one is refused: a
    cosine that is missing has no value to stand in for it."""

    def embed(texts: list[str]) -> np.ndarray:
        keys = {text: key_of("embedding", asker.form.model, text) for text in texts}
        new = [text for text in keys if asker.replies.get(keys[text]) is None]
        chunks = [new[i : i + TEXTS_PER_REQUEST] for i in range(0, len(new), TEXTS_PER_REQUEST)]
        asker.run([lambda chunk=chunk: request_vectors(asker, chunk, keys) for chunk in chunks])
        return np.stack([np.frombuffer(asker.replies.get(keys[text]), np.float32) for text in texts])

    return embed


def request_vectors(asker: Asker, texts: list[str], keys: dict[str, str]):
    try:
        reply = asker.client.request(json.dumps({"model": asker.form.model, "input": texts}).encode(), [])
        rows = {item["index"]: np.array(item["embedding"], np.float32) for item in json.loads(reply)["data"]}
        vectors = [rows[i] for i in range(len(texts))]
        if len({vector.shape for vector in vectors}) != 1 or not all(
            np.isfinite(v).all() and v.ndim == 1 for v in vectors
        ):
            raise ValueError("the vectors are not of one length")
    except (RequestFailed, RequestRefused, ValueError, LookupError, TypeError) as error:
        if isinstance(error, EndpointError):
            raise
        raise EvaluationError(f"{asker.client.name}: no embeddings of {len(texts)} texts: {error}") from error
    finally:
        asker.note_spent()
    asker.replies.put({keys[text]: vector.tobytes() for text, vector in zip(texts, vectors, strict=True)})
