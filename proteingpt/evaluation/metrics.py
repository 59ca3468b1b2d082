"""Exact match after a stated normalisation: the score that a closed question has.

Chosen to forgive spelling and never content: case, spacing, quotes, a full stop, trailing zeros of a decimal.
Given up: synonyms, units and word order; `X-ray` and `X-ray diffraction` are different answers.
"""

import re
import unicodedata
from collections.abc import Sequence

QUOTES = "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb"

# A decimal that stands alone: not part of a word, nor of a dotted number such as a version or an EC number.
DECIMAL = re.compile(r"(?<![\w.])([0-9]+)\.([0-9]+)(?!\.?\w)")


def normalise(text: str) -> str:
    """The form in which answers are compared. Applying it twice changes nothing.

    In this order: unicode NFKC and casefold (compatibility caseless matching, Unicode Standard 3.13, D146); whitespace
    runs to one space; quotes around, full stops behind and the space they leave; trailing zeros of decimals, so that
    `1.50` is `1.5` and `2.0` is `2`.
    """
    text = " ".join(_fold_case(text).split())
    stripped = _strip_marks(text)
    while stripped != text:
        text, stripped = stripped, _strip_marks(stripped)
    return DECIMAL.sub(_shorten_decimal, text)


def _fold_case(text: str) -> str:
    for _ in range(2):
        # Once is not enough: NFKC can bring up letters that fold again.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return text


def _strip_marks(text: str) -> str:
    return text.strip().strip(QUOTES).rstrip(".")


def _shorten_decimal(match: re.Match) -> str:
    whole, fraction = match.group(1), match.group(2).rstrip("0")
    return f"{whole}.{fraction}" if fraction else whole


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both normalise to the same text."""
    return normalise(prediction) == normalise(answer)


def accuracy(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """The share of exact matches, 0 to 1. Every question weighs the same, whatever its protein.

    Raises ValueError when the two differ in number, or when there are none.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers: wanted one for each")
    if not answers:
        raise ValueError("no answers to score: accuracy needs at least one question")
    return sum(map(exact_match, predictions, answers)) / len(answers)
