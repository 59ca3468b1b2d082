"""How fast each rank is: measured while it trains, and agreed upon now and then.

Speeds decide only who computes which pack, never what is in a step. They are exchanged at known steps and come into
force LAG steps later, so that every rank, also one that has read ahead, shares out a step by the same numbers; and they
are kept in the checkpoint, so that a resumed run repeats itself to the bit on the same devices.
"""

from collections import deque
from statistics import median

import torch

from proteingpt.config import DevicesConfig
from proteingpt.distributed import gather_objects

# Steps between agreeing on speeds and using them: more than the loader reads ahead.
LAG = 6
# Steps whose rates are looked at; their median does not see a step that was slow for a reason of its own.
MEMORY = 5
# The first steps of a run compile, allocate and fill caches.
IGNORED = 2

# First guess, before anything is measured: tokens per second of 7B training, from LLM-Foundry's published table.
DEVICE_SPEEDS = {"H200": 10_643.0, "H100": 10_643.0, "A100-SXM4-80GB": 4_641.0, "A100 80GB": 4_641.0, "A100": 3_679.0}


def first_guess(device: torch.device) -> float:
    """Tokens per second by the name of the device; 1.0 for one that no table knows, which makes unknown ones equal."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return next((speed for key, speed in DEVICE_SPEEDS.items() if key in name), 1.0)


class Balance:
    """Agreed speeds by step. `agreed`: [(first step, speeds of the ranks), ...], ascending; the whole of its state."""

    def __init__(self, config: DevicesConfig, device: torch.device, agreed: list | None = None):
        self.config = config
        self.rates: deque[float] = deque(maxlen=MEMORY)
        self.num_seen = 0
        world = gather_objects(first_guess(device))
        if config.balance == "equal":
            world = [1.0] * len(world)
        # Others come from another set of ranks.
        known = [entry for entry in agreed or [] if len(entry[1]) == len(world)] if config.balance == "measured" else []
        self.agreed: list[tuple[int, list[float]]] = [(step, list(speeds)) for step, speeds in known] or [(0, world)]

    def speeds(self, step: int) -> list[float]:
        """What `step` is shared out by. The reading thread asks, while the loop appends."""
        in_force = [speeds for first, speeds in tuple(self.agreed) if first <= step]
        return in_force[-1] if in_force else self.agreed[0][1]

    def observe(self, num_tokens: int, seconds: float):
        """This rank's own work in a step, without waiting for others or for data."""
        self.num_seen += 1
        if self.num_seen > IGNORED and num_tokens and seconds > 0:
            self.rates.append(num_tokens / seconds)

    def exchange(self, steps_done: int):
        """A collective, at steps that every rank knows."""
        if self.config.balance != "measured" or steps_done % self.config.exchange_every_steps:
            return
        measured = gather_objects(median(self.rates) if self.rates else None)
        if all(measured):
            self.agreed.append((steps_done + LAG, measured))
            self.agreed = self.agreed[-(LAG + 2) :]
