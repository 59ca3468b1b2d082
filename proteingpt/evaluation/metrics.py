"""What a closed question is scored by: exact match after a stated normalisation, numbers, and classes.

Chosen to forgive spelling and never content: case, spacing, quotes, a full stop, trailing zeros of a decimal.
Given up: synonyms, units and word order; `X-ray` and `X-ray diffraction` are different answers.
"""

import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

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


# ------------------------------------------------------------------------------------------------ numbers and classes

# Groups of three digits may be parted by commas.
NUMBER = re.compile(r"[+-]?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)?(\.[0-9]+)?(e[+-]?[0-9]+)?")


def parse_number(text: str) -> float | None:
    """The number that the whole normalised text is, as in `1,204` or `0.9795`; None for any other text, as `2 A`."""
    text = normalise(text)
    match = NUMBER.fullmatch(text)
    if not match or not (match.group(1) or match.group(3)):
        return None
    number = float(text.replace(",", ""))
    return number if math.isfinite(number) else None


def within_tolerance(prediction: str, answer: float, tolerance: float) -> bool:
    """Whether the prediction is a number that differs by at most `tolerance` times the answer's size."""
    number = parse_number(prediction)
    return number is not None and abs(number - answer) <= tolerance * abs(answer) * (1 + 1e-12)


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur. confusion: (..., K, K), counts or weights of answer by prediction.

    Returns (...); NaN where nothing was asked. As scikit-learn's balanced_accuracy_score.
    """
    asked = confusion.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.diagonal(confusion, axis1=-2, axis2=-1) / asked
        return np.where(asked > 0, recall, 0).sum(axis=-1) / (asked > 0).sum(axis=-1)


def matthews_correlation(confusion: np.ndarray) -> np.ndarray:
    """Matthews' coefficient for any number of classes (Gorodkin 2004, Comput. Biol. Chem. 28:367), as scikit-learn's.

    confusion: (..., K, K) of answer by prediction. Returns (...); 0 where answers or predictions are all alike.
    """
    answers, predictions = confusion.sum(axis=-1), confusion.sum(axis=-2)
    total, right = answers.sum(axis=-1), np.trace(confusion, axis1=-2, axis2=-1)
    covariance = right * total - (answers * predictions).sum(axis=-1)
    spread = (total**2 - (predictions**2).sum(axis=-1)) * (total**2 - (answers**2).sum(axis=-1))
    return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)
