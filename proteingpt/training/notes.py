"""What a run notes beside its checkpoints, in files of lines. A full disk costs such a file, not the training."""

import dataclasses
import json
import logging
from pathlib import Path

from proteingpt.config import replace_text

log = logging.getLogger("proteingpt")


def append_new_lines(path: Path, lines: list[str]):
    """Those that are not there yet: a run that went back meets the same ones again."""
    try:
        known = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines if line not in known)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def write_predictions(predictions, path: Path):
    """One of evaluation.held_out a line."""
    lines = (json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in predictions)
    try:
        replace_text(path, "".join(lines))
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def note_evaluation(path: Path, scores: dict):
    """STAGE/evaluations.jsonl: a line for each, so that a restart knows which are done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(scores) + "\n")
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def evaluated_steps(path: Path) -> set[int]:
    """A torn line counts as none: that evaluation is made again."""
    steps = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            steps.add(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return steps
