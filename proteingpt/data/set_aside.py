"""Samples that could not be read while a run trains: named, counted, written down, and the end of the run if too many.

Each rank keeps its own file and counts what it reads itself: a fault of one node's disk is that node's.
"""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from proteingpt.data.shard_format import ShardError
from proteingpt.protein import Turn

log = logging.getLogger("proteingpt")

# Of fewer samples no share is taken: the first bad one would be all of them.
FEWEST_READ = 100


class TooManyBad(ShardError):
    """More samples than the set share cannot be read."""


class SetAside:
    """num_read: how many reads there were. reasons: {key: why}, of the samples that could not be read, each once.

    path: a file of JSON lines that is appended to, or None. max_share: of the samples read; beyond it `bad` raises.
    """

    def __init__(self, path: Path | None = None, max_share: float = 1.0):
        self.path, self.max_share = path, max_share
        self.num_read = self.num_bad_reads = 0
        self.reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def good(self):
        with self._lock:
            self.num_read += 1

    def bad(self, key: str, error: ShardError):
        """Raises TooManyBad."""
        with self._lock:
            self.num_read += 1
            self.num_bad_reads += 1
            if key not in self.reasons:
                self.reasons[key] = str(error)
                log.warning("set aside: %s", error)
                self._write({"key": key, "shard": getattr(error, "shard", None), "reason": str(error)})
            num_bad, num_read = self.num_bad_reads, self.num_read
        if num_read >= FEWEST_READ and num_bad > self.max_share * num_read:
            raise TooManyBad(
                f"{num_bad} of {num_read} samples that this rank read could not be used, more than data.max_bad_share "
                f"({self.max_share:g}); the last: {error}. Check with python launch/shards.py verify DIR, and copy the "
                "shards anew"
            ) from error

    def _write(self, record: dict):
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def readable_texts(shards) -> Iterator[tuple[str, tuple[Turn, ...]]]:
    """Description and turns of every sample whose text can be read; the others are named in the log."""
    for i in range(len(shards)):
        try:
            yield shards.read_text(i)
        except ShardError as error:
            log.warning("left out: %s", error)
