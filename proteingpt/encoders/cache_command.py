"""What launch/cache_embeddings.py does: write a cache, or estimate what one costs."""

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from proteingpt.config import NO_ENCODER, ConfigError, EncodersConfig
from proteingpt.data.published import PublishedDataError
from proteingpt.data.shards import ShardError, ShardSet
from proteingpt.distributed import LaunchError, Rank, detect, gather_objects, start, stop
from proteingpt.encoders.cache_plan import estimate, format_estimate, rates_by_kind
from proteingpt.encoders.cache_run import all_jobs, cache_embeddings, open_splits
from proteingpt.encoders.pair import Encoders
from proteingpt.encoders.weights import ESM_IF1_NAME, BadCheckpoint, UnknownWeights, WeightsNotFound

USER_ERRORS = (ConfigError, LaunchError, ShardError, PublishedDataError, WeightsNotFound, UnknownWeights, BadCheckpoint)
NUM_MEASURED = 4
SIGTERM_STATUS = 128 + signal.SIGTERM  # as the shell says of a program that a signal has ended


def main(options: argparse.Namespace) -> int:
    """The exit status. Errors of the user are one sentence, said by the rank that has them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_STATUS))  # lets go of its shard, which another takes over
    try:
        rank = detect(os.environ)
        logging.basicConfig(format="%(message)s", level=logging.INFO if rank.is_first else logging.ERROR)
        config = config_of(options)
        device = start(rank)
        if device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // rank.world_size))
        (show_estimate if options.estimate else write)(options, config, rank, device)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:  # above all a full disk
        said = "the shards that are finished are kept: mend that, and the same command goes on"
        print(f"error: while writing {options.out}: {error}; {said}", file=sys.stderr, flush=True)
        return 1
    stop()
    return 0


def config_of(options: argparse.Namespace) -> EncodersConfig:
    published = options.from_published is not None
    config = EncodersConfig(
        esm2=NO_ENCODER if published else options.esm2,
        esm_if1=ESM_IF1_NAME if published else options.esm_if1,
        esm2_layer=options.esm2_layer,
        weights_dir=options.weights_dir,
        dtype=options.dtype,
        backend=options.backend,
    )
    if options.out is None and not options.estimate:
        raise ConfigError("--out is not set: give the directory for the embeddings, as in shards/NAME-esm")
    if not published:
        Encoders.find(config)
    return config


def write(options: argparse.Namespace, config: EncodersConfig, rank: Rank, device) -> None:
    manifest = cache_embeddings(
        options.data, options.out, config, device, together=options.together and not options.from_published,
        published=options.from_published, overwrite=options.overwrite, progress=sys.stderr if rank.is_first else None,
    )  # fmt: skip
    if rank.is_first:
        print(report(options.data, options.out, manifest), flush=True)


def report(data: str, out: str, manifest: dict | None) -> str:
    if manifest is None:
        return f"{out} is finished already"
    num_samples = sum(total["num_samples"] for total in manifest["totals"].values())
    num_bytes = sum(total["num_bytes"] for total in manifest["totals"].values())
    left_out = [f"  left out: {key}: {why}" for key, why in manifest["left_out"].items()]
    lines = [f"{num_samples} proteins, {num_bytes:,} bytes, {len(left_out)} left out", *left_out[:20]]
    if len(left_out) > 20:
        lines.append(f"  and {len(left_out) - 20} more: see left_out in {Path(out) / 'manifest.json'}")
    return "\n".join([*lines, f"next: train with --data {data} --embeddings {out}"])


# ----------------------------------------------------------------------------------------------------------- estimate


def show_estimate(options: argparse.Namespace, config: EncodersConfig, rank: Rank, device, file: TextIO = sys.stdout):
    """For --cluster, or the ranks that were started times --ranks. Rates are --rates, or measured now on every rank."""
    splits, measured, given = open_splits(options.data), [], options.rates
    if given is None:
        rate = residues_per_second(Encoders.load(config, device), splits[0], device)
        measured = gather_objects((torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", rate))
    if options.cluster:
        rates, sources = rates_by_kind(options.cluster.kinds, given, measured)
    else:
        rates = given or [rate for _, rate in measured] * (options.ranks or 1)
        sources = ["given by --rates" if given else f"measured now, on {NUM_MEASURED} proteins"]
    found = estimate(
        sum(job.num_bytes for job in all_jobs(splits, Encoders.widths(config), config.dtype)),
        {shards.split: int(shards.num_residues.sum()) for shards in splits},
        rates,
        epochs=options.epochs,
        readings_per_epoch=options.readings,
    )
    if rank.is_first:
        print(f"residues/s                {sum(rates):,.0f} in all: {'; '.join(sources)}", file=file)
        print(format_estimate(found, options.epochs, len(rates)), file=file, flush=True)


def residues_per_second(encoders: Encoders, shards: ShardSet, device) -> float:
    """Of this rank, on proteins from the middle of the lengths: the first is encoded once before, to warm up."""
    middle = shards.num_residues.argsort()[len(shards) // 2 :][:NUM_MEASURED]
    proteins = [shards.read_protein(int(number)) for number in middle]
    encoders.encode(proteins[:1])
    began = time.perf_counter()
    for protein in proteins:
        rows = encoders.encode([protein])
        [part[0].cpu() for part in rows]  # waits for the device
    return sum(map(len, proteins)) / (time.perf_counter() - began)
