"""How fast each rank is: measured while it trains, and agreed upon now and then.

Speeds decide only who computes which pack, never what is in a step. They are exchanged at known steps and come into
force LAG steps later, so that every rank, also one that has read ahead, shares out a step by the same numbers; and they
are kept in the checkpoint, so that a resumed run repeats itself to the bit on the same devices. So are the limits of
ranks that have run out of memory. On other devices neither holds, so the names of the devices are kept with them.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import harmonic_mean, median

import torch

from proteingpt.config import DevicesConfig
from proteingpt.distributed import gather_objects

log = logging.getLogger("proteingpt")

# Steps between agreeing on speeds and using them: more than the loader reads ahead.
LAG = 6
# Steps whose rates are looked at: with LAG and the steps between exchanges still a relief within 20.
MEMORY = 10
# The first steps of a run compile, allocate and fill caches.
IGNORED = 2
# A rank is behind below this share of the usual speed of its class, and named when it was so at so many exchanges.
BEHIND, STAYS = 0.75, 3

# First guess, before anything is measured: tokens per second of 7B training, from LLM-Foundry's published table.
DEVICE_SPEEDS = {"H200": 10_643.0, "H100": 10_643.0, "A100-SXM4-80GB": 4_641.0, "A100 80GB": 4_641.0, "A100": 3_679.0}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def first_guess(device: torch.device) -> float:
    """Tokens per second by the name of the device; 1.0 for one that no table knows, which makes unknown ones equal."""
    name = device_name(device)
    return next((speed for key, speed in DEVICE_SPEEDS.items() if key in name), 1.0)


def steady(rates: Sequence[float]) -> float:
    """The speed to reckon with after these rates: the mean, in time for a token, of those that are left without the
    quarter of the slowest and of the fastest, one each at least, so that no step counts that was slow for a reason of
    its own, such as a checkpoint beside it. Of one or two the faster. On noisy CPU cores it shares steps out better
    than a median (benchmarks/README.md)."""
    left_out = max(len(rates) // 4, 1)
    return harmonic_mean(sorted(rates)[left_out:-left_out] or [max(rates)])


def behind(speeds: Sequence[float], classes: Sequence[str]) -> list[int]:
    """Ranks slower than BEHIND times the median of the others of their class. A rank without fellows is never
    behind."""
    slow = []
    for rank, (speed, name) in enumerate(zip(speeds, classes, strict=True)):
        fellows = [s for r, s in enumerate(speeds) if classes[r] == name and r != rank]
        if fellows and speed < BEHIND * median(fellows):
            slow.append(rank)
    return slow


def limits_of(limits: Sequence[int | None], had: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """The limits of ranks that have the kind of device they had; None for the others, and for another number of
    ranks."""
    if not len(limits) == len(had) == len(classes):
        return [None] * len(classes)
    return [limit if was == name else None for limit, was, name in zip(limits, had, classes)]


@dataclass(frozen=True)
class Exchanged:
    """What an exchange has brought to light, by rank: tokens per second while computing; share of the time since the
    last that a rank did not compute; share of a step that the speeds in force give it; what it told beside. slow: the
    ranks that stay behind their class."""

    speeds: list[float]
    waiting: list[float]
    slow: list[int]
    shares: list[float] = field(default_factory=list)
    told: list = field(default_factory=list)


class Balance:
    """Agreed speeds by step, and limits by rank: the whole of its state.

    agreed: [(first step, speeds of the ranks), ...], ascending. limits: tokens of a forward, None without limit.
    classes: the devices' names; `measured_on` those that agreed and limits are of, None where an older checkpoint does
    not say.
    """

    def __init__(
        self,
        config: DevicesConfig,
        device: torch.device,
        agreed: list | None = None,
        limits: list | None = None,
        measured_on: list[str] | None = None,
    ):
        self.config = config
        self.rates: deque[float] = deque(maxlen=MEMORY)
        self.num_seen = 0
        self.busy = self.passed = 0.0
        here = gather_objects((device_name(device), first_guess(device)))
        self.classes, world = [name for name, _ in here], [speed for _, speed in here]
        self.times_behind: Counter[int] = Counter()
        if config.balance == "equal":
            world = [1.0] * len(world)
        had = self.classes if measured_on is None else measured_on
        # Others come from another set of ranks. Of two unlike devices one would be measured and one guessed: all or
        # none.
        kept = config.balance == "measured" and had == self.classes
        known = [entry for entry in agreed or [] if kept and len(entry[1]) == len(world)]
        self.agreed: list[tuple[int, list[float]]] = [(step, list(speeds)) for step, speeds in known] or [(0, world)]
        self.limits = limits_of(limits or [], had, self.classes)

    def speeds(self, step: int) -> list[float]:
        """What `step` is shared out by. The reading thread asks, while the loop appends."""
        in_force = [speeds for first, speeds in tuple(self.agreed) if first <= step]
        return in_force[-1] if in_force else self.agreed[0][1]

    def limited(self, capacities: Sequence[int | None]) -> list[int | None]:
        """Each rank's capacity, or its limit where that is lower."""
        pairs = zip(capacities, self.limits, strict=True)
        return [min((value for value in pair if value is not None), default=None) for pair in pairs]

    def lower(self, rank: int, num_tokens: int):
        """`rank` ran out of memory in a forward of so many tokens: half of it from now on. On every rank alike, and
        with no step read ahead: whoever shares out by another limit computes other packs."""
        self.limits[rank] = min(max(1, num_tokens // 2), self.limits[rank] or num_tokens)

    def observe(self, num_tokens: int, seconds: float, passed_seconds: float = 0.0):
        """This rank's own work in a step, without waiting for others or for data, and the wall time of the step."""
        self.num_seen += 1
        self.busy, self.passed = self.busy + seconds, self.passed + passed_seconds
        if self.num_seen > IGNORED and num_tokens and seconds > 0:
            self.rates.append(num_tokens / seconds)

    def exchange(self, steps_done: int, tell: Callable[[], object] = lambda: None) -> Exchanged | None:
        """A collective, at steps that every rank knows. tell: asked then for a small value that is to travel with it.
        None where nothing is measured yet. Where speeds are not to be measured they are exchanged for those who watch
        alone."""
        if steps_done % self.config.exchange_every_steps:
            return None
        waiting = 1 - self.busy / self.passed if self.passed > self.busy else 0.0
        self.busy = self.passed = 0.0
        everyone = gather_objects((steady(self.rates) if self.rates else None, waiting, tell()))
        measured, waits, told = (list(column) for column in zip(*everyone))
        if not all(measured):
            return None
        in_force = self.speeds(steps_done)
        if self.config.balance == "measured":
            self.agreed.append((steps_done + LAG, measured))
            self.agreed = self.agreed[-(LAG + 2) :]
        shares = [speed / sum(in_force) for speed in in_force]
        return Exchanged(measured, waits, self.staying_behind(measured, steps_done), shares, told)

    def staying_behind(self, speeds: list[float], steps_done: int) -> list[int]:
        """Ranks that were behind at the last STAYS exchanges, named in the log when they become so."""
        slow = behind(speeds, self.classes)
        self.times_behind = Counter({rank: self.times_behind[rank] + 1 for rank in slow})
        for rank in slow:
            if self.times_behind[rank] == STAYS and torch.distributed.get_rank() == 0:
                fellows = [s for r, s in enumerate(speeds) if self.classes[r] == self.classes[rank] and r != rank]
                log.warning(
                    "rank %d (%s) stays slow: %.0f tokens/s by step %d, where its fellows have %.0f; %s. "
                    "Look at its clock, temperature and neighbours",
                    rank, self.classes[rank], speeds[rank], steps_done, median(fellows),
                    "it gets less to do" if self.config.balance == "measured" else "with devices.balance: measured it "
                    "would get less to do",
                )  # fmt: skip
        return [rank for rank in slow if self.times_behind[rank] >= STAYS]
