"""What was asked and answered, as it is shown and saved.

The conversation is kept for its reader. It is not fed to the model: that was trained on single questions, so each one
is asked afresh, and every file that is saved says so. """

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

NOTE = "Each question is asked on its own: the model does not see earlier questions and answers."
SUFFIXES = (".json", ".md")


class SaveError(ValueError):
    """A conversation that cannot be written."""


@dataclass(frozen=True)
class Exchange:
    """missing: what the model did not get of the protein, in sentences."""

    protein: str
    question: str
    answer: str
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict:
        return {**asdict(self), "missing": list(self.missing)}


def as_json(model: str, exchanges: Sequence[Exchange]) -> str:
    values = {"model": model, "note": NOTE, "exchanges": [one.to_json() for one in exchanges]}
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def as_markdown(model: str, exchanges: Sequence[Exchange]) -> str:
    """Proteins as headings, questions bold, answers quoted. What was typed or answered stands there as text."""
    lines, protein = ["# Questions and answers", "", f"Model: {escaped(model)}. {NOTE}", ""], None
    for one in exchanges:
        if one.protein != protein:
            protein = one.protein
            lines += [f"## {escaped(protein)}", "", *(f"- {escaped(note)}" for note in one.missing)]
            lines += [""] * bool(one.missing)
        lines += [f"**{escaped(' '.join(one.question.split()))}**", ""]
        lines += [f"> {escaped(line)}".rstrip() for line in one.answer.splitlines()] + [""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """As Markdown shows it letter by letter."""
    return "".join("\\" + c if c in "\\`*_{}[]<>#|~!&" else c for c in text)


def save(path: str | Path, model: str, exchanges: Sequence[Exchange]):
    """As its ending says: .json or .md. Never over a file that is there. Raises SaveError."""
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise SaveError(f"{path}: wanted a name that ends in {' or '.join(SUFFIXES)}")
    text = (as_json if path.suffix == ".json" else as_markdown)(model, exchanges)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise SaveError(f"{path} is there already: choose another name") from None
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror or error}") from error


def printable(text: str) -> str:
    """Without what a terminal would obey: control characters other than line ends and tabs, and marks of direction."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
