"""How facts are read from text, the same in every format."""

import datetime
import re
from collections.abc import Iterable

from proteingpt.data.structure.atoms import unique

# By computation, as exptl.method and EXPDTA name it.
COMPUTED_METHODS = frozenset({"THEORETICAL MODEL", "AB INITIO MODEL", "HOMOLOGY MODEL"})
WATERS = ("HOH", "DOD")
HYDROGENS = ("H", "D", "T")
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def is_day(text: str) -> bool:
    """Whether it is a day of the calendar as `2023-05-17`."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def split_keywords(text: str | None, classification: str | None) -> tuple[str, ...] | None:
    """Keywords between commas, each once, without the classification, which depositors tend to repeat among them."""
    if text is None:
        return None
    words = unique(word for word in (part.strip() for part in text.split(",")) if word)
    return tuple(word for word in words if word.casefold() != (classification or "").casefold())


def first_resolution(texts: Iterable[str]) -> float | None:
    return next((number for number in positive_numbers(texts) if number < 1000), None)


def positive_numbers(texts: Iterable[str]) -> list[float]:
    """Those of the texts that are numbers above zero, to four decimals: BinaryCIF may give 2.8000000000000003."""
    numbers = []
    for text in texts:
        try:
            number = round(float(text), 4)
        except ValueError:
            continue
        if 0 < number < float("inf"):
            numbers.append(number)
    return numbers


def methodology_of(methods: Iterable[str], is_predicted: bool) -> str | None:
    """`experimental` where any experiment is named, `computational` where only computation is, or a pLDDT is there."""
    methods = [method.upper() for method in methods]
    if any(method not in COMPUTED_METHODS for method in methods):
        return "experimental"
    return "computational" if methods or is_predicted else None
