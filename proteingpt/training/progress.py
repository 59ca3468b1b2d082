"""RUN/progress.json: where the run is, for whoever looks at it from outside. Rank 0 replaces it whole, without a sync,
at most once a second; a disk that does not take it costs nothing but the view. What is in it can be lost.
"""

import json
import logging
import math
import os
import time
from pathlib import Path

log = logging.getLogger("proteingpt")

NAME = "progress.json"
EVERY_SECONDS = 1.0
MAX_BYTES = 2**24  # a thousand ranks take a fiftieth
KEPT_LOSSES = 100  # of the last steps, from which a trend is read


class ProgressFile:
    """Of one stage. values: what has been noted so far, as JSON."""

    def __init__(self, directory: Path, values: dict):
        self.path, self.values, self.written_at, self.warned = directory / NAME, dict(values), None, False

    def note(self, now: bool = False, **values):
        """Remember these, and write all if it is time to, or `now`."""
        self.values |= values
        if now or self.written_at is None or time.monotonic() - self.written_at >= EVERY_SECONDS:
            self.write()

    def write(self):
        self.written_at = time.monotonic()
        aside = self.path.with_name(f".{NAME}.partial")
        try:
            aside.write_text(json.dumps(finite(self.values), allow_nan=False) + "\n", encoding="utf-8")
            os.replace(aside, self.path)
        except OSError as error:
            if not self.warned:
                log.warning(
                    "%s cannot be written (%s): launch/status.py will not see how far it is", self.path, error.strerror
                )
            self.warned = True


def finite(value):
    """The same for JSON: NaN and infinities, which it has not, become null; what is rounded off is beyond six
    digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value


def read_progress_file(directory: Path) -> dict:
    """What stands there; nothing where there is no such file, or another's."""
    return read_object(directory / NAME)


def read_object(path: Path) -> dict:
    """A JSON object, {} where it is missing, torn, too large or something else."""
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def number(value) -> float | None:
    """Of JSON that anybody may have written: a finite number, else None."""
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def whole(value) -> int | None:
    return value if type(value) is int else None
