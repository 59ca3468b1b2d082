"""Checkpoints written by a thread while the training goes on: a save costs it the copy to the CPU only.

One save at a time: the next waits for the one before. A disk that does not take one is said and counted, the last good
checkpoint stays, and the next save point tries again; at a stage's end, or before a stop, it is an error.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from proteingpt.training import checkpoint
from proteingpt.training.checkpoint import CheckpointError, Progress

log = logging.getLogger("proteingpt")

LOOK_SECONDS = 1.0


def bytes_aside(directory: Path) -> int:
    """Of the checkpoint that is being written; its files may be renamed meanwhile."""
    total = 0
    for path in directory.glob(".step-*/*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


class Saver:
    """Of one stage, on rank 0 alone. failed: called for each save that the disk did not take. grows: called now and
    then while a save is waited for and its files grow: a slow disk is no hang."""

    def __init__(
        self, directory: Path, keep_last: int, failed: Callable[[], None] = lambda: None,
        grows: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.directory, self.keep_last, self.failed, self.grows = directory, keep_last, failed, grows
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.saved_step: int | None = None  # of the newest that is whole on the disk

    def start(self, state: dict, progress: Progress):
        """Begin to write a snapshot, which nobody changes any more. Raises what the save before ended with, unless it
        was the disk."""
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(state, progress), name="checkpoint")
        self.thread.start()

    def write(self, state: dict, progress: Progress):
        try:
            checkpoint.save(self.directory, state, progress, self.keep_last)
            self.saved_step = progress.steps_done
        except BaseException as error:  # handed to the main thread
            self.error = error

    def wait(self):
        """For the save under way, if any."""
        if self.thread is None:
            return
        size = 0
        while self.thread.is_alive():
            self.thread.join(LOOK_SECONDS)
            before, size = size, bytes_aside(self.directory)
            if size != before:
                self.grows()
        self.thread, error, self.error = None, self.error, None
        if isinstance(error, CheckpointError):
            self.failed()
            kept = checkpoint.checkpoints(self.directory)
            last = f"{kept[0]} stays" if kept else "there is none before it"
            log.warning("%s; %s, and the next save point tries again", error, last)
        elif error is not None:
            raise error

    def finish(self, step: int):
        """Wait until the checkpoint of `step`, the last that was begun, is on the disk. CheckpointError if it is
        not."""
        self.wait()
        if self.saved_step != step:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.directory}, as said above: make room, "
                "then the same command goes on from the one before"
            )

    def mark_best(self, step: int, metric: str, value: float):
        """Keep the checkpoint of `step` as the best, if it could be written."""
        self.wait()
        if self.saved_step == step:
            try:
                path = self.directory / f"step-{step:08d}"
                checkpoint.mark_best(path, metric, value)
                checkpoint.prune(self.directory, path, self.keep_last)  # the best before
            except OSError as error:
                log.warning("the best checkpoint cannot be marked: %s", error)
