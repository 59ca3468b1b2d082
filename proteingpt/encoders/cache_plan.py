"""What an embedding cache will hold, before anything is encoded: its shards, their exact size, and whether it pays.

Pure: lengths and rates in, bytes and hours out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from proteingpt.config import ConfigError
from proteingpt.data.shard_format import TAR_BLOCK_BYTES, padded
from proteingpt.encoders import rows_file

# tarfile ends an archive with two empty blocks and fills it up to a whole record (POSIX.1-1988, ustar).
TAR_END_BYTES, TAR_RECORD_BYTES = 2 * TAR_BLOCK_BYTES, 10240


class Job(NamedTuple):
    """One data shard, whose rows become one embedding shard of the same name. first, last: its samples in the split."""

    name: str
    split: str
    first: int
    last: int
    num_residues: int
    num_bytes: int


def jobs_of(
    split: str,
    keys: Sequence[str],
    lengths: Sequence[int],
    shards: Sequence[int],
    widths: Mapping[str, int],
    dtype: str,
) -> list[Job]:
    """A job for each shard of a split. lengths: residues of each sample; shards: the number of its shard, ascending."""
    jobs = []
    starts = [i for i in range(len(keys)) if i == 0 or shards[i] != shards[i - 1]]
    for first, last in zip(starts, [*starts[1:], len(keys)]):
        sizes = [rows_file.num_bytes(keys[i], lengths[i], widths, dtype) for i in range(first, last)]
        num_residues = sum(lengths[i] for i in range(first, last))
        jobs.append(Job(f"{split}-{shards[first]:05d}", split, first, last, num_residues, tar_bytes(sizes)))
    return jobs


def tar_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a tar with one member of each size."""
    end = sum(TAR_BLOCK_BYTES + padded(size) for size in sizes) + TAR_END_BYTES
    return -(-end // TAR_RECORD_BYTES) * TAR_RECORD_BYTES


def rates_by_kind(
    kinds: Sequence, given: Sequence[float] | None, measured: Sequence[tuple[str, float]]
) -> tuple[list[float], list[str]]:
    """(residues/s of each rank of a cluster; where each kind's is from). kinds: of the cluster, with `count`, `name`,
    `label` and `flops`, what its training is held to reach or None. given: a rate for each kind, else `measured`: (name
    by the driver, rate) of devices at hand. A kind that is not at hand is scaled from one that is. ConfigError where it
    cannot.
    """
    if given is not None and len(given) != len(kinds):
        raise ConfigError(
            f"--rates has {len(given)} rates for the {len(kinds)} kinds of --cluster: give one for each kind"
        )
    at_hand = {}
    for kind in kinds:
        own = [rate for name, rate in measured if kind.name.lower() in name.lower()]
        if own:
            at_hand[kind.label] = sum(own) / len(own), kind
    rates, sources = [], []
    for number, kind in enumerate(kinds):
        if given is not None:
            rate, source = given[number], "given by --rates"
        elif kind.label in at_hand:
            rate, source = at_hand[kind.label][0], "measured now"
        else:
            known = [(rate, like) for rate, like in at_hand.values() if like.flops and kind.flops]
            if not known:
                names = ", ".join(sorted({name for name, _ in measured}))
                raise ConfigError(
                    f"no rate for {kind.label}: the device here ({names}) is none that it could be scaled from. Give "
                    "--rates, one for each kind of --cluster, as --estimate prints them on a device of that kind"
                )
            rate, like = known[0]
            rate, source = rate * kind.flops / like.flops, f"assumed: that of {like.label} by the rates of training"
        rates += [rate] * kind.count
        sources.append(f"{kind.count} x {kind.label} at {rate:,.0f}, {source}")
    return rates, sources


class Estimate(NamedTuple):
    """num_bytes: of the cache. Hours: to make it, and of encoders that run with the training, in an epoch and in
    all."""

    num_bytes: int
    hours_to_cache: float
    hours_live_per_epoch: float
    hours_live: float

    @property
    def cache_is_better(self) -> bool:
        return self.hours_to_cache < self.hours_live


def estimate(
    num_bytes: int,
    num_residues: Mapping[str, int],
    residues_per_second: Sequence[float],
    *,
    epochs: int,
    readings_per_epoch: float = 1,
) -> Estimate:
    """num_residues: of each split; `train` is what epochs read, each protein `readings_per_epoch` times (once for each
    group of its questions). residues_per_second: of every rank, which share the work as each can."""
    per_hour = 3600 * sum(residues_per_second)
    per_epoch = num_residues["train"] * readings_per_epoch / per_hour
    return Estimate(num_bytes, sum(num_residues.values()) / per_hour, per_epoch, epochs * per_epoch)


def format_estimate(found: Estimate, epochs: int, num_ranks: int) -> str:
    saved = found.hours_live - found.hours_to_cache
    better = "cache them" if found.cache_is_better else "let them run with the training"
    return "\n".join(
        [
            f"bytes to cache            {found.num_bytes:,} ({found.num_bytes / 1e9:.2f} GB)",
            f"hours to cache            {found.hours_to_cache:.3g} on {num_ranks} rank(s)",
            f"hours live, each epoch    {found.hours_live_per_epoch:.3g}",
            f"hours live, {epochs} epoch(s)    {found.hours_live:.3g}, less what is hidden behind the step",
            f"better                    {better} (saves {abs(saved):.3g} hours)",
        ]
    )
