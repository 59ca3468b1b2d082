"""What launch/cache_embeddings.py does: write a cache, or estimate what one costs."""

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from proteingpt.config import NO_ENCODER, ConfigError, EncodersConfig
from proteingpt.data.published import PublishedDataError
from proteingpt.data.shards import ShardError, ShardSet
from proteingpt.distributed import LaunchError, Rank, detect, gather_objects, start, stop
from proteingpt.encoders.cache_plan import estimate, format_estimate
from proteingpt.encoders.cache_run import all_jobs, cache_embeddings, open_splits
from proteingpt.encoders.pair import Encoders
from proteingpt.encoders.rows_file import PARTS
from proteingpt.encoders.weights import ESM_IF1_NAME, BadCheckpoint, UnknownWeights, WeightsNotFound

USER_ERRORS = (ConfigError, LaunchError, ShardError, PublishedDataError, WeightsNotFound, UnknownWeights, BadCheckpoint)
# Of the longest time that a rank may take for what others wait for; nothing of ours waits in a collective for long.
TIMEOUT_SECONDS = 24 * 3600
NUM_MEASURED = 4


def main(options: argparse.Namespace) -> int:
    """The exit status. Errors of the user are one sentence, said by the rank that has them."""
    try:
        rank = detect(os.environ)
        logging.basicConfig(format="%(message)s", level=logging.INFO if rank.is_first else logging.ERROR)
        config = config_of(options)
        device = start(rank, TIMEOUT_SECONDS)
        if device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // rank.world_size))
        (show_estimate if options.estimate else write)(options, config, rank, device)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
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
        options.data, options.out, config, rank, device, together=options.together and not options.from_published,
        published=options.from_published, overwrite=options.overwrite, progress=sys.stderr,
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


def show_estimate(options: argparse.Namespace, config: EncodersConfig, rank: Rank, device, file: TextIO = sys.stdout) -> None:
    """From --rates, or from the rate of every rank, or of this one times --ranks."""
    splits = open_splits(options.data)
    encoders = Encoders.load(config, device)
    widths = {part: getattr(encoders, part).width for part in PARTS}
    if options.rates:
        rates = [float(rate) for rate in options.rates.split(",")]
    else:
        rates = gather_objects(residues_per_second(encoders, splits[0], device)) * (options.ranks or 1)
    found = estimate(
        sum(job.num_bytes for job in all_jobs(splits, widths, config.dtype)),
        {shards.split: int(shards.num_residues.sum()) for shards in splits},
        rates,
        epochs=options.epochs,
        readings_per_epoch=options.readings,
    )
    if rank.is_first:
        how = "given" if options.rates else f"measured on {NUM_MEASURED} proteins"
        print(f"residues/s                {sum(rates):,.0f} in all, {how}", file=file)
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
