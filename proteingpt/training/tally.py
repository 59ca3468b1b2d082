"""What a rank counts of its own work between two exchanges of speeds, for those who watch.

It travels with the speeds (training/balance.py), so that watching costs no collective. MFU is left out for a device
that no data sheet here knows, such as a CPU.
"""

import resource
import socket
from dataclasses import dataclass

import torch

from proteingpt.devices import peak_flops
from proteingpt.training.balance import device_name


@dataclass(frozen=True)
class RankReport:
    """Of one rank since the last exchange. tokens_per_second: over wall time, waiting for data in it. flops: a second,
    of the LLM's matrix products, and peak_flops of the device, None where they are not known. memory_gib: peak so far,
    of memory_total_gib, None for a CPU, whose memory is not the rank's."""

    device: str
    host: str
    tokens_per_second: float
    flops: float | None
    peak_flops: float | None
    memory_gib: float
    memory_total_gib: float | None

    @property
    def mfu(self) -> float | None:
        return self.flops / self.peak_flops if self.flops is not None and self.peak_flops else None


class Tally:
    """flops: (of a token, of an answer token), or None. peak: FLOP/s of the device; None asks its name."""

    def __init__(self, device: torch.device, flops: tuple[float, float] | None = None, peak: float | None = None):
        self.device, self.name, self.flops = device, device_name(device), flops
        self.peak = peak or peak_flops(self.name)
        self.tokens = self.answers = 0
        self.seconds = 0.0

    def add(self, tokens: int, answers: int, seconds: float):
        """Tokens and answer tokens that this rank read in a step of so many seconds."""
        self.tokens, self.answers, self.seconds = self.tokens + tokens, self.answers + answers, self.seconds + seconds

    def take(self) -> RankReport:
        """What has been counted since the last time."""
        seconds = max(self.seconds, 1e-9)
        known = self.flops is not None and self.peak is not None
        flops = (self.flops[0] * self.tokens + self.flops[1] * self.answers) / seconds if known else None
        total = (
            torch.cuda.get_device_properties(self.device).total_memory / 2**30 if self.device.type == "cuda" else None
        )
        memory, host = memory_bytes() / 2**30, socket.gethostname()
        made = RankReport(self.name, host, self.tokens / seconds, flops, self.peak if known else None, memory, total)
        self.tokens, self.answers, self.seconds = 0, 0, 0.0
        return made


def mfu_of_all(reports: list[RankReport]) -> float | None:
    """What all ranks compute over what all their devices could; None where one of them is not known."""
    if not reports or any(report.mfu is None for report in reports):
        return None
    return sum(report.flops for report in reports) / sum(report.peak_flops for report in reports)


def memory_bytes() -> int:
    """Peak memory of this rank: of its GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
