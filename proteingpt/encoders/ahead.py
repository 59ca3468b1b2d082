"""Live encoders run ahead: while a step trains, the rows of the next are computed.

On a GPU by a thread and on a stream of their own, where they fill what training leaves idle. A thread, because encoders
wait for the device (how many edges has this residue?), and launch thousands of kernels, while which the step would not
be launched. On a CPU there is nothing idle: the thread would take the cores from the step, so there they run when
asked.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from proteingpt.encoders.pair import Remembering, Rows, rows_of
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


class Computed(NamedTuple):
    """pairs: rows by key. seconds: from the host's clock. began, ended: on the stream of the encoders; None on a
    CPU."""

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    seconds: float = 0.0
    began: "torch.cuda.Event | None" = None
    ended: "torch.cuda.Event | None" = None


class Times:
    """Seconds between pairs of events, which are known some time after."""

    def __init__(self):
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds = 0.0

    def take(self) -> float:
        """Of all that has ended since last asked."""
        done = [pair for pair in self.events if pair[1].query()]
        self.events = self.events[len(done) :]  # a stream ends them in order
        seconds, self.seconds = self.seconds, 0.0
        return seconds + sum(begin.elapsed_time(end) for begin, end in done) / 1000


class RunAhead:
    """Encoders whose time is measured and which, on a GPU, have begun with the next step's proteins before this step's
    are trained on. Rows are the same in any order, since each protein is encoded by itself.

    The thread computes and nothing else: what is remembered is read and changed by the caller's thread, and only rows
    that its stream has waited for are.
    """

    def __init__(self, encoders: Remembering, device: torch.device, ahead: bool | None = None):
        """ahead: with a thread; by default on a GPU."""
        self.encoders, self.device = encoders, torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.thread = ThreadPoolExecutor(1, "encoders") if (on_gpu if ahead is None else ahead) else None
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which has loaded the weights
        self.working, self.waited = Times(), Times()
        self._begun: Future[Computed] | None = None
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # of this step, there for the caller's stream

    def of(self, work: Iterable) -> Iterator:
        """The same steps of work (`packs`, each with its `proteins`); with a thread the next one's encoding has begun.

        That asks for one step more than is trained, which counts with what the loader reads ahead (balance.LAG).
        """
        try:
            for item, self._begun in one_ahead(work, self._begin) if self.thread else ((item, None) for item in work):
                self._pairs = {}
                yield item
        finally:
            if self.thread:
                self.thread.submit(int).result()  # or what was begun would take memory and time from what comes next
            self._begun, self._pairs = None, {}
            if hasattr(work, "close"):
                work.close()

    def _begin(self, item) -> Future:
        packs = [pack for pack in item.packs if pack.rows is None]
        proteins = {p.key: p for pack in packs for p in pack.proteins if p.key not in self.encoders.kept}
        return self.thread.submit(self._compute, list(proteins.values()))

    def _compute(self, proteins: list[Protein]) -> Computed:
        """In the thread; returns before the device is done."""
        if not proteins:
            return Computed({})
        began, events = time.perf_counter(), (None, None)
        # Streams are a thread's own: without this it would be the default one, and wait for the step.
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            if self.stream:
                events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
                events[0].record()
            try:
                pairs = zip(*self.encoders.encoders.encode(proteins))
                found = dict(zip([protein.key for protein in proteins], pairs))
            except torch.OutOfMemoryError:
                found = {}  # the step that needs them will ask again, where such an error is dealt with
            if self.stream:
                events[1].record()
        return Computed(found, time.perf_counter() - began, *events)

    def _collect(self) -> None:
        """Waits for what was begun for this step, or raises what it has raised."""
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        if self.stream is None:
            began = time.perf_counter()
            found = begun.result()
            self.working.seconds += found.seconds
            self.waited.seconds += time.perf_counter() - began
        else:
            current = torch.cuda.current_stream(self.device)
            # Between the two it stands still, once it has done what it was told before: for the thread, then for its
            # stream.
            stood = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            stood[0].record(current)
            found = begun.result()
            if found.ended:
                current.wait_event(found.ended)
                self.working.events.append((found.began, found.ended))
            stood[1].record(current)
            self.waited.events.append(stood)
            for pair in found.pairs.values():
                for rows in pair:
                    rows.record_stream(current)  # or its memory would go to the next launch while it is still read
        self._pairs = found.pairs

    def rows(self, pack) -> Rows:
        """The pack's rows on the device: read from a cache with the pack, begun before, or computed now. Raises what
        the encoders raise."""
        return rows_of(pack, self, self.device)

    def encode(self, proteins: Sequence[Protein]) -> Rows:
        self._collect()
        began = time.perf_counter()
        found = self.encoders.encode(proteins, self._pairs)
        if self.stream is None:
            seconds = time.perf_counter() - began
            self.working.seconds += seconds
            self.waited.seconds += seconds
        return found

    def take_seconds(self) -> tuple[float, float]:
        """(of the encoders, hidden behind the step or not; that the step stood still for them) since last asked."""
        return self.working.take(), self.waited.take()
