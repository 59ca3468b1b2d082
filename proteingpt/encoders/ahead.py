"""Live encoders run ahead: while a step trains, the rows of the next are computed.

On a GPU on a stream of their own, where they fill what training leaves idle. On a CPU there is nothing idle: a thread would
take the cores from the step (two threads on one core: no gain), so there they run when they are asked.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from proteingpt.encoders.pair import Rows, rows_of
from proteingpt.protein import Protein

Item = TypeVar("Item")
Begun = TypeVar("Begun")


def one_ahead(items: Iterable[Item], begin: Callable[[Item], Begun]) -> Iterator[tuple[Item, Begun]]:
    """(item, begin(item)) in order; whenever one is given out, the next has been begun."""
    waiting: list[tuple[Item, Begun]] = []
    for item in items:
        waiting.append((item, begin(item)))
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


class RunAhead:
    """Encoders whose time is measured and which, on a GPU, have begun with the next step's proteins before this step's
    are trained on. Rows are the same in any order, since each protein is encoded by itself."""

    def __init__(self, encoders, device: torch.device):
        self.encoders, self.device = encoders, torch.device(device)
        self.stream = torch.cuda.Stream(device) if self.device.type == "cuda" else None
        self._begun: tuple[dict, torch.cuda.Event | None] = ({}, None)  # rows by key, and when they are there
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def of(self, work: Iterable) -> Iterator:
        """The same steps of work (`packs`, each with its `proteins`); on a GPU the next one's encoding has begun.

        That asks for one step more than is trained, which counts with what the loader reads ahead (balance.LAG).
        """
        try:
            for item, self._begun in one_ahead(work, self._launch) if self.stream else ((item, ({}, None)) for item in work):
                yield item
        finally:
            if hasattr(work, "close"):
                work.close()

    def _launch(self, item) -> tuple[dict, torch.cuda.Event]:
        """Starts on the stream of its own and returns before the rows are there."""
        packs = [pack for pack in item.packs if pack.rows is None]
        unique = {protein.key: protein for pack in packs for protein in pack.proteins}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # for weights and rows that it made
        with torch.cuda.stream(self.stream):
            begin.record()
            try:
                pairs = list(zip(*self.encoders.encode(list(unique.values()))))
            except torch.OutOfMemoryError:
                pairs = []  # the step that needs them will ask again, where such an error is dealt with
            end.record()
        self._events.append((begin, end))
        return dict(zip(unique, pairs)), end

    def rows(self, pack) -> Rows:
        """The pack's rows on the device: read from a cache with the pack, begun before, or computed now."""
        began = time.perf_counter()
        rows = rows_of(pack, self, self.device)
        self._seconds += time.perf_counter() - began if self.stream is None else 0.0
        return rows

    def encode(self, proteins: Sequence[Protein]) -> Rows:
        if self.stream is None:
            return self.encoders.encode(proteins)
        current, (begun, there) = torch.cuda.current_stream(self.device), self._begun
        if all(protein.key in begun for protein in proteins):
            current.wait_event(there)
            found = tuple(list(part) for part in zip(*(begun[protein.key] for protein in proteins)))
        else:
            found = self.encoders.encode(proteins)
        for rows in (*found[0], *found[1]):
            rows.record_stream(current)  # or its memory would be given to the next launch while it is still read
        return found

    def take_seconds(self) -> float:
        """Seconds of the encoders since last asked, hidden behind the step or not; on a GPU, of its own stream."""
        done = [pair for pair in self._events if pair[1].query()]
        self._events = self._events[len(done) :]  # a stream ends them in order
        seconds, self._seconds = self._seconds, 0.0
        return seconds + sum(begin.elapsed_time(end) for begin, end in done) / 1000
