"""Seconds of a step on a cluster: pure arithmetic on packs, rates and bytes.

A step takes as long as its slowest rank, then its gradients are exchanged and the weights updated. Under ZeRO 3 weights
are fetched behind the computation, and whichever takes longer counts.
"""

from dataclasses import dataclass

from proteingpt.cluster.shapes import Flops, total
from proteingpt.data.shares import assign

# Bytes that an AdamW update moves for a parameter, and at what rate, on a GPU and (offload) on a host: assumed.
UPDATE_BYTES, GPU_BYTES_PER_SECOND, HOST_BYTES_PER_SECOND = 40, 1e12, 2e10


@dataclass(frozen=True)
class Rate:
    """Of a rank: a forward and backward take overhead_seconds + FLOPs / flops, where one of attention on a prefix
    counts as prefix_cost, from a branch as branch_cost. update_seconds: per parameter whose state it has. source:
    measured or assumed, and by whom."""

    flops: float
    overhead_seconds: float
    update_seconds: float
    source: str
    prefix_cost: float = 1.0
    branch_cost: float = 1.0

    def seconds(self, work: Flops) -> float:
        counted = work.matrix + self.prefix_cost * work.prefix + self.branch_cost * work.branch
        return self.overhead_seconds + counted / self.flops


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank sends or receives, of each forward (hidden behind it) and of each step, over a link of
    bytes_per_second."""

    of_forward: float
    of_step: float
    bytes_per_second: float


def traffic(
    stage: int,
    element: int,
    frozen: int,
    trained: int,
    world_size: int,
    link_gbps: float,
    offloads=False,
    offloads_weights=False,
) -> Traffic:
    """Ring collectives: an all-reduce moves 2 (n - 1) / n of a buffer, an all-gather or a reduce-scatter half of
    that."""
    part = (world_size - 1) / world_size
    of_forward = of_step = 0.0
    if stage == 3:
        weights = element * (frozen + trained)
        of_forward = part * (2 * weights + element * trained) + (2 * weights / world_size if offloads_weights else 0)
    else:
        of_step = part * element * trained * (3 if stage else 2)  # the updated weights are gathered
    if offloads:
        of_step += 2 * element * trained / (world_size if stage else 1)
    return Traffic(of_forward, of_step, link_gbps * 1e9)


def step_seconds(
    tokens: list[int], flops: list[Flops], encoder_flops: list[float], rates: list[Rate], speeds: list[float],
    capacities: list[int | None], moved: Traffic, state: float, equal_counts: bool = False,
) -> float:  # fmt: skip
    """tokens, flops, encoder_flops: of each pack. speeds: that packs are shared out by. state: parameters whose
    optimizer state a rank has. equal_counts: as many forwards on every rank (ZeRO 3)."""
    shares = assign(tokens, speeds, capacities, equal_counts)
    fetching = moved.of_forward / moved.bytes_per_second
    slowest = 0.0
    for rate, forwards in zip(rates, shares):
        busy = 0.0
        for packs in forwards or [[]]:
            work = packs or [min(range(len(tokens)), key=tokens.__getitem__)]  # the shortest, repeated in silence
            busy += max(rate.seconds(total(flops[p] for p in work)), fetching)
            busy += sum(encoder_flops[p] for p in packs) / rate.flops
        slowest = max(slowest, busy)
    return slowest + moved.of_step / moved.bytes_per_second + max(rate.update_seconds for rate in rates) * state
