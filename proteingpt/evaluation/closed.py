"""Closed questions: which are closed, of what kind, and their scores under any weighting of the proteins.

A question is closed if its exact text is asked of many proteins and its answers are short; its kind is read off its
answers. Scores are functions of weights over proteins, so that the same code gives estimate and bootstrap.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from proteingpt.evaluation.metrics import (
    balanced_accuracy,
    exact_match,
    matthews_correlation,
    normalise,
    parse_number,
    within_tolerance,
)
from proteingpt.evaluation.predictions import Record

MIN_PROTEINS = 2  # of which a closed question is asked, and
MIN_SHARE = 0.02  # the share of the proteins of which it is
MAX_WORDS = 8  # mean words of its answers
MAX_CLASSES = 50  # a question with more different answers has no balanced accuracy
YEARS = range(1900, 2101)

Statistic = Callable[[np.ndarray], np.ndarray]  # weights (B, P) -> values (B,), NaN where nothing is left to score


def closed_questions(records: Sequence[Record]) -> set[str]:
    """The questions that count as closed among what is asked."""
    asked, words = defaultdict(set), defaultdict(list)
    for record in records:
        if record.question.strip():
            asked[record.question].add(record.key)
            words[record.question].append(len(record.answer.split()))
    fewest = max(MIN_PROTEINS, MIN_SHARE * len({record.key for record in records}))
    return {q for q, keys in asked.items() if len(keys) >= fewest and np.mean(words[q]) <= MAX_WORDS}


def kind_of(answers: Sequence[str]) -> str:
    """`yes/no`, `year`, `number`, `category` (up to MAX_CLASSES different answers) or `text`, by the true answers."""
    forms = {normalise(answer) for answer in answers}
    numbers = [parse_number(form) for form in forms]
    if forms <= {"yes", "no"}:
        return "yes/no"
    if None not in numbers:
        return "year" if all(number in YEARS for number in numbers) else "number"
    return "category" if len(forms) <= MAX_CLASSES else "text"


@dataclass(frozen=True)
class Question:
    """A closed question with what was said to it: N records of proteins `places` (N,), exact hits `hits` (N,).

    For `number` also `close` (N,), whether within the tolerance, and `errors` (N,), absolute, NaN where the prediction
    is no number. For `yes/no` and `category` also true and said classes (N,), of which the last is "none of them".
    """

    text: str
    kind: str
    places: np.ndarray
    hits: np.ndarray
    close: np.ndarray | None = None
    errors: np.ndarray | None = None
    true: np.ndarray | None = None
    said: np.ndarray | None = None
    num_classes: int = 0

    def confusion(self, weights: np.ndarray) -> np.ndarray:
        """(B, K, K) of answer by prediction, from weights (B, P)."""
        size = self.num_classes
        codes = self.true * size + self.said
        order = np.argsort(codes, kind="stable")
        cells, starts = np.unique(codes[order], return_index=True)
        made = np.zeros((len(weights), size * size))
        made[:, cells] = np.add.reduceat(weights[:, self.places[order]], starts, axis=1)
        return made.reshape(-1, size, size)

    @property
    def has_classes(self) -> bool:
        """Whether classes can be told apart at all: two of them occur."""
        return self.true is not None and len(np.unique(self.true)) > 1


def make_questions(records: Sequence[Record], kinds: dict[str, str], place_of: dict[str, int], tolerance: float):
    """kinds: closed question -> kind, by the true answers of the whole set, so that all compared agree on it."""
    by_text = defaultdict(list)
    for record in records:
        if record.question in kinds:
            by_text[record.question].append(record)
    return [make_question(text, kinds[text], by_text[text], place_of, tolerance) for text in kinds if by_text[text]]


def make_question(text: str, kind: str, records: list[Record], place_of: dict[str, int], tolerance: float) -> Question:
    places = np.array([place_of[record.key] for record in records])
    hits = np.array([exact_match(record.prediction, record.answer) for record in records], float)
    if kind == "number":
        answers = [parse_number(record.answer) for record in records]
        said = [parse_number(record.prediction) for record in records]
        close = [within_tolerance(record.prediction, a, tolerance) for record, a in zip(records, answers, strict=True)]
        errors = [np.nan if s is None else abs(s - a) for s, a in zip(said, answers, strict=True)]
        return Question(text, kind, places, hits, close=np.array(close, float), errors=np.array(errors))
    if kind in ("yes/no", "category"):
        classes = {form: i for i, form in enumerate(sorted({normalise(record.answer) for record in records}))}
        true = np.array([classes[normalise(record.answer)] for record in records])
        said = np.array([classes.get(normalise(record.prediction), len(classes)) for record in records])
        return Question(text, kind, places, hits, true=true, said=said, num_classes=len(classes) + 1)
    return Question(text, kind, places, hits)


def mean_of(places: np.ndarray, values: np.ndarray) -> Statistic:
    """The weighted mean of values that belong to proteins; NaN values are left out."""
    there = ~np.isnan(values)
    sums = np.bincount(places[there], weights=values[there])
    counts = np.bincount(places[there])

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = weights[:, : len(counts)] @ counts
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 0, weights[:, : len(sums)] @ sums / total, np.nan)

    return statistic


def over_questions(questions: list[Question], score) -> Statistic:
    """The mean over questions of a score of their confusions."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.mean([score(question.confusion(weights)) for question in questions], axis=0)

    return statistic


def closed_statistics(questions: list[Question]) -> dict[str, Statistic]:
    """Name -> statistic, of those that the questions allow."""
    made = {}

    def add_mean(name: str, chosen: list[Question], values):
        if chosen:
            places = np.concatenate([question.places for question in chosen])
            made[name] = mean_of(places, np.concatenate([values(question) for question in chosen]))

    add_mean("exact", questions, lambda q: q.hits)
    for kind in ("yes/no", "category", "number", "year", "text"):
        add_mean(f"exact {kind}", [q for q in questions if q.kind == kind], lambda q: q.hits)
    add_mean("number within tolerance", [q for q in questions if q.kind == "number"], lambda q: q.close)
    classed = [question for question in questions if question.has_classes]
    if classed:
        made["balanced accuracy"] = over_questions(classed, balanced_accuracy)
        made["Matthews correlation"] = over_questions(classed, matthews_correlation)
    return made


def question_statistics(question: Question) -> dict[str, Statistic]:
    """The statistics of one question, for the table by question."""
    made = {"exact": mean_of(question.places, question.hits)}
    if question.kind == "number":
        made["number within tolerance"] = mean_of(question.places, question.close)
        made["mean absolute error"] = mean_of(question.places, question.errors)
        made["share that are numbers"] = mean_of(question.places, np.isfinite(question.errors).astype(float))
    if question.has_classes:
        made["balanced accuracy"] = over_questions([question], balanced_accuracy)
        made["Matthews correlation"] = over_questions([question], matthews_correlation)
    return made
