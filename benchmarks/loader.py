"""Reading: proteins per second and core, checksums on, over plain webdataset decoding the same samples.

    python -m benchmarks.loader [--proteins 3000]

Proteins of PDB lengths with 29 questions each, in real shards, from the page cache: what the reader costs, no disk.
Training reads proteins and has the texts as token ids; that is the ratio, and whole samples stand beside it. Then a raw
sequential read of the same bytes, the limit; packs from the prefetch thread, and from a process that has to hand them
over; and what a consumer of 25 packs a second waits for.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset

from benchmarks import world
from proteingpt.config import StageConfig
from proteingpt.data.index import build_index
from proteingpt.data.loader import Share, StageData, TrainingPlan, prefetch
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardCache, ShardSet, write_shards
from proteingpt.demo.llm import write_tiny_llm
from proteingpt.model import assemble

ROUNDS = 5  # of each, in turns; the median is taken
CHUNK_BYTES = 1 << 20
# What a GPU takes of 4,096-token packs is 3 to 25 a second.
PACKS_PER_SECOND = 25.0
TOKENS_PER_PACK = 4096


def rate(count: int, work: Callable[[], object]) -> float:
    """Per second of this process's own CPU time: on a shared core the clock on the wall measures the neighbours."""
    began = time.process_time()
    work()
    return count / (time.process_time() - began)


def use(samples: Iterator):
    """Takes each and lets it go, as training does."""
    for _ in samples:
        pass


def raw_read(shards: ShardSet):
    for shard in shards.shards:
        with open(shards.directory / shard["file"], "rb", buffering=0) as file:
            while file.read(CHUNK_BYTES):
                pass


def webdataset_samples(shards: ShardSet) -> Iterator[dict]:
    urls = [str(shards.directory / shard["file"]) for shard in shards.shards]
    yield from webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()


def check_same(shards: ShardSet):
    """Both give the same sample before either is timed."""
    theirs, ours = next(webdataset_samples(shards)), shards.read(0)
    assert (theirs["backbone.npy"] == ours.protein.backbone).all() and theirs["sequence.txt"] == ours.protein.sequence
    assert [turn["A"] for turn in theirs["qa.json"]] == [turn.answer for turn in ours.turns]


def reading_rates(shards: ShardSet, order: np.ndarray) -> dict[str, float]:
    """Samples per second of CPU. Ours in the random order of training, the others in the order of the files."""
    ways = {
        "raw": lambda: raw_read(shards),
        "webdataset": lambda: use(webdataset_samples(shards)),
        "samples": lambda: use(map(shards.read, order)),
        "proteins": lambda: use(map(shards.read_protein, order)),
    }
    found = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, work in ways.items():
            found[way].append(rate(len(shards), work))
    return {way: float(np.median(rates)) for way, rates in found.items()}


def make_plan(directory: Path, shards: ShardSet) -> TrainingPlan:
    stage = StageConfig(
        **world.STAGE, tokens_per_step=16 * TOKENS_PER_PACK, tokens_per_pack=TOKENS_PER_PACK, questions_per_group=4
    )
    prompt = Prompt(assemble.load_tokenizer(str(directory / "llm")), TEMPLATES["released", "instruct"], 256)
    fits = np.flatnonzero(shards.num_residues < TOKENS_PER_PACK // 2 - 300)
    data = StageData(shards, build_index(shards, "instruct", prompt), prompt.prefix_ids, fits)
    return TrainingPlan(data, stage, seed=0)


def make(plan: TrainingPlan) -> Callable:
    return lambda step: plan.work(step, Share(0, [1.0], [None], False))


def send_packs(plan: TrainingPlan, num_steps: int, pipe, received):
    for step in range(num_steps):
        pipe.put(make(plan)(step))
    received.wait()  # tensors are handed over by this process as long as it lives


def thread_rate(plan: TrainingPlan, num_steps: int) -> float:
    """Packs per second of the wall, as both halves work at once."""
    began = time.perf_counter()
    count = sum(len(work.packs) for work in prefetch(make(plan), 0, num_steps))
    return count / (time.perf_counter() - began)


def process_rate(plan: TrainingPlan, num_steps: int) -> float:
    context = multiprocessing.get_context("fork")
    pipe, received = context.Queue(maxsize=4), context.Event()
    began = time.perf_counter()
    process = context.Process(target=send_packs, args=(plan, num_steps, pipe, received), daemon=True)
    process.start()
    count = sum(len(pipe.get().packs) for _ in range(num_steps))
    seconds = time.perf_counter() - began
    received.set()
    process.join()
    return count / seconds


def waiting_share(plan: TrainingPlan, num_steps: int, packs_per_second: float) -> float:
    """Of the time of a consumer that is busy with each pack; the first step left out, when nothing is ahead yet."""
    work = prefetch(make(plan), 0, num_steps)
    busy = len(next(work).packs) / packs_per_second
    time.sleep(busy)
    began, waited = time.perf_counter(), 0.0
    for _ in range(1, num_steps):
        asked = time.perf_counter()
        item = next(work)
        waited += time.perf_counter() - asked
        time.sleep(len(item.packs) / packs_per_second)
    return waited / (time.perf_counter() - began)


def measure(directory: Path, num_proteins: int) -> dict:
    samples = world.samples(num_proteins, seed=0)
    texts = sorted({turn.question + turn.answer for sample in samples[:50] for turn in sample.turns})
    write_tiny_llm(directory / "llm", texts, width=32, num_layers=1, seed=0)
    write_shards(directory, {"train": samples}, samples_per_shard=500, options={})
    shards = ShardSet(directory, "train", ShardCache(directory / "cache"))
    check_same(shards)
    order = np.random.default_rng(0).permutation(len(shards)).tolist()
    for i in order:
        shards.read(i)  # verifies each shard once, and fills the page cache for all
    rates = reading_rates(shards, order)
    plan = make_plan(directory, shards)
    num_steps = min(40, plan.num_steps)
    plan.packs(0)  # planned before the clock runs, for thread and process alike
    num_bytes = sum(shard["num_bytes"] for shard in shards.shards)
    return {
        "ratio": rates["proteins"] / rates["webdataset"],
        "whole_samples_ratio": rates["samples"] / rates["webdataset"],
        "share_of_raw_read": rates["proteins"] / rates["raw"],
        "samples_per_second": rates["samples"],
        "proteins_per_second": rates["proteins"],
        "webdataset_per_second": rates["webdataset"],
        "raw_read_per_second": rates["raw"],
        "bytes_per_sample": num_bytes / len(shards),
        "thread_packs_per_second": thread_rate(plan, num_steps),
        "process_packs_per_second": process_rate(plan, num_steps),
        "waiting_share": waiting_share(plan, min(12, num_steps), PACKS_PER_SECOND),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), args.proteins)
    lines = [
        f"{args.proteins} proteins of PDB lengths, {world.QUESTIONS_PER_PROTEIN} questions each, "
        f"{figures['bytes_per_sample'] / 1e3:.1f} kB a sample, one core",
        f"  raw sequential read           {figures['raw_read_per_second']:9,.0f} samples/s",
        f"  webdataset, decoded           {figures['webdataset_per_second']:9,.0f} samples/s",
        f"  ours, as training reads       {figures['proteins_per_second']:9,.0f} samples/s  {figures['ratio']:.1f} x "
        f"webdataset, {figures['share_of_raw_read']:.2f} of the raw read",
        f"  ours, texts decoded as well   {figures['samples_per_second']:9,.0f} samples/s  "
        f"{figures['whole_samples_ratio']:.1f} x webdataset",
        f"  packs of {TOKENS_PER_PACK} tokens: {figures['thread_packs_per_second']:,.0f} a second from a thread, "
        f"{figures['process_packs_per_second']:,.0f} from a process",
        f"  a consumer of {PACKS_PER_SECOND:.0f} packs a second waits for {figures['waiting_share']:.2%} of its time",
    ]
    world.print_figures(lines, figures)


if __name__ == "__main__":
    main()
