"""Predictions on disk: JSON lines, one for each question, whole lines only, so that a killed run goes on where it was.

DIR/NAME/made-from.json says what they were made from; each rank appends to a file of its own, and any number of ranks
reads what all have left.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

MADE_FROM = "made-from.json"


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked: what was found, what was wanted, what to do."""


@dataclass(frozen=True)
class Record:
    """One question with its true answer and what was predicted. turn: its number among the protein's."""

    key: str
    turn: int
    question: str
    answer: str
    prediction: str


class PredictionStore:
    """The predictions of one contestant, in a directory of its own."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)

    def open(self, made_from: dict):
        """Makes the directory, or makes sure that what lies there was made from the same. By one rank."""
        path = self.directory / MADE_FROM
        wanted = json.loads(json.dumps(made_from))
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            if other:
                name = other[0]
                raise EvaluationError(
                    f"{self.directory} holds predictions made with other settings ({', '.join(other)}; {name} was "
                    f"{found.get(name)!r}, is {wanted.get(name)!r}): give another --out, or remove that directory"
                )
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.jsonl"):
            leftover.unlink()  # of a run that was killed before it had begun
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)

    def read(self) -> dict[tuple[str, int], Record]:
        """All whole lines of all ranks; a line cut by a kill counts as not there."""
        records = {}
        for path in sorted(self.directory.glob("rank-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                record = read_line(line)
                if record is not None:
                    records.setdefault((record.key, record.turn), record)
        return records

    def append(self, rank: int, records: Iterable[Record]):
        """In one write. Starts a new line where the last was cut."""
        text = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
        with open(self.directory / f"rank-{rank:05d}.jsonl", "ab+") as file:
            if file.tell() and not ends_whole(file):
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def ends_whole(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_line(line: bytes) -> Record | None:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError):
        return None
