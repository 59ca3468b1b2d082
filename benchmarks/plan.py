"""Planning: seconds for an epoch of the PDB, how full its packs are, how evenly they are shared out; tokenising;
memory.

    python -m benchmarks.plan [--proteins 132092] [--turns 60000] [--samples 1000000] [--window 4194304]

No model and no structure. Proteins have the lengths of PDB chains and 29 questions each; planning is timed from the
lengths in memory to the packs of every step of an epoch. `ratio` is 5 seconds over the slowest. Texts are tokenised on
two cores, `--turns` of them, and the time for 3.7 million is reckoned from that. Memory is that of a process which
opens a set of `--samples` samples (indexes without shards behind them) with a description each and plans its first
step, at a quarter of them and at all; what 100 million would take is the line through both, and a window of its full
size beside it.
"""

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import world
from benchmarks.mixed_devices import A100_40, H100
from proteingpt.cluster.work import pdb_lengths
from proteingpt.config import StageConfig
from proteingpt.data import index as token_index
from proteingpt.data import plan, shard_set, shares
from proteingpt.data.columns import made_once
from proteingpt.data.loader import StageData, TrainingPlan
from proteingpt.data.shards import ShardSet, write_shards
from proteingpt.protein import Sample, Turn, prefix_length
from proteingpt.training.capacity import line, of_process

WANTED_SECONDS, ALL_TURNS, MANY_SAMPLES = 5.0, 3_700_000, 100_000_000
# Questions a group and tokens a pack: fast-instruct; smaller packs; smaller groups, of which there are more.
CUTS = ((30, 8192), (30, 4096), (8, 4096))
PACKS_PER_STEP = 32  # asked for; the planner looks for a number near it that can be shared out evenly
SPEEDS = [H100, H100, A100_40, A100_40]


# --------------------------------------------------------------------------------------------------------- planning


def pdb_samples(
    num: int, num_questions: int = world.QUESTIONS_PER_PROTEIN, tokens=(15, 46), seed: int = 0
) -> plan.Samples:
    """Of as many questions each, of 15 to 45 tokens, behind 12 tokens and the protein's rows."""
    rng = np.random.default_rng((seed, num))
    return plan.Samples(
        ids=rng.integers(0, 2**63, num).astype(np.uint64),
        prefix_tokens=12 + prefix_length(np.array(pdb_lengths(num, seed), np.int64)),
        first_turn=np.arange(num + 1) * num_questions,
        turn_tokens=rng.integers(*tokens, num * num_questions),
        weights=np.ones(num),
    )


def totals_of(samples: plan.Samples, cut: plan.Cut) -> plan.Totals:
    size, asked = plan.survey(samples, cut)
    few = min(len(samples.ids), plan.GROUPS_SAMPLED)
    turns = samples.first_turn[few]
    first = plan.Samples(
        samples.ids[:few], samples.prefix_tokens[:few], samples.first_turn[: few + 1], samples.turn_tokens[:turns],
        samples.weights[:few],
    )  # fmt: skip
    return plan.Totals(np.array([size]), np.array([asked]), plan.packing_rate(first, cut))


def plan_epoch(
    samples: plan.Samples, per_group: int, tokens_per_pack: int, packs_per_step: int
) -> tuple[dict, plan.WindowPlan]:
    """By this process's own time, as others use the cores as well."""
    cut = plan.Cut(
        42, per_group, tokens_per_step=packs_per_step * tokens_per_pack, tokens_per_pack=tokens_per_pack,
        shards_per_window=1,
    )  # fmt: skip
    totals = totals_of(samples, cut)
    began = time.process_time()
    (window,) = plan.windows(totals, cut, 0)
    made = plan.plan_window(samples, cut, 0, window.num_steps)
    seconds = time.process_time() - began
    full = float(made.pack_tokens.mean()) / tokens_per_pack
    return {"seconds": seconds, "fill": full, "packs": len(made.pack_tokens), "groups": len(made.sample)}, made


def balance(samples: plan.Samples, tokens_per_pack: int = 4096) -> dict:
    """What steps of the number of packs that the planner finds reach on unlike devices, on average over the epoch."""
    num_packs = shares.best_count(PACKS_PER_STEP, SPEEDS)
    _, made = plan_epoch(samples, 8, tokens_per_pack, num_packs)
    reached = [shares.reached(made.step_tokens(number), SPEEDS) for number in range(made.num_steps)]
    return {"packs_a_step": num_packs, "share_of_the_sum": float(np.mean(reached))}


# -------------------------------------------------------------------------------------------------------- tokenising


def texts_of(num_turns: int, recurring: bool) -> list[Sample]:
    """Closed questions, which recur from protein to protein; or open ones, each another."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeiourstlnmpdcgh"), rng.integers(3, 10))) for _ in range(5000)]
    asked = world.QUESTIONS_PER_PROTEIN
    made = world.samples(-(-num_turns // asked), seed=0, longest=40)
    if recurring:
        closed = [tuple(Turn(turn.question, str(number % 40)) for turn in s.turns) for number, s in enumerate(made)]
        return [Sample(s.protein, s.description, turns) for s, turns in zip(made, closed)]
    text = lambda count: " ".join(rng.choice(words, count))  # noqa: E731
    return [Sample(s.protein, s.description, tuple(Turn(text(14), text(14)) for _ in s.turns)) for s in made]


def index_rates(directory: Path, num_turns: int) -> dict:
    """Turns per second of the wall, on two cores, which this process keeps to from then on."""
    from proteingpt.data.prompts import TEMPLATES, Prompt
    from proteingpt.demo.llm import write_tiny_llm
    from proteingpt.model import assemble

    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
    different = texts_of(num_turns, recurring=False)
    texts = [turn.question for sample in different[:200] for turn in sample.turns]
    write_tiny_llm(directory / "llm", texts, width=32, num_layers=1, vocab_size=16_000)
    prompt = Prompt(assemble.load_tokenizer(str(directory / "llm")), TEMPLATES["paper", "instruct"], 384)
    rates = {}
    for name, samples in (("recurring", texts_of(num_turns, recurring=True)), ("different", different)):
        write_shards(directory / name, {"train": samples}, samples_per_shard=1000, options={})
        shards = ShardSet(directory / name, "train")
        began = time.perf_counter()
        built = token_index.build_index(shards, "instruct", prompt)
        rates[name] = int(built.first_turn[-1]) / (time.perf_counter() - began)
    return rates


# ------------------------------------------------------------------------------------------------------------ memory


def write_hollow(directory: Path, num_samples: int, per_shard: int = 10_000) -> Path:
    """A split as it lies on disk, its tars nothing but holes, and the token index of a description each."""
    lengths, stride, records = pdb_lengths(1000, 0), 65_536, []
    directory.mkdir()
    for number, first in enumerate(range(0, num_samples, per_shard)):
        samples = range(first, min(first + per_shard, num_samples))
        lines = []
        for place, sample in enumerate(samples):
            fields = zip(shard_set.FIELDS, range(512 + place * stride, (place + 1) * stride, 8192))
            members = ",".join(f'"{field}":[{offset},8000,{sample}]' for field, offset in fields if field[0] != "c")
            lines.append(
                f'{{"key":"{sample:08d}_A","num_residues":{lengths[sample % 1000]},"num_turns":1,'
                f'"members":{{{members}}}}}\n'
            )
        content, name = "".join(lines).encode(), f"train-{number:05d}"
        (directory / f"{name}.index.jsonl").write_bytes(content)
        with open(directory / f"{name}.tar", "wb") as file:
            file.truncate(len(samples) * stride)
        records.append({
            "file": f"{name}.tar", "sha256": f"{number:064x}", "num_bytes": len(samples) * stride,
            "index_file": f"{name}.index.jsonl", "index_sha256": hashlib.sha256(content).hexdigest(),
            "num_samples": len(samples), "num_residues": 300 * len(samples), "num_turns": len(samples),
        })  # fmt: skip
    manifest = {
        "format": "proteingpt-shards",
        "format_version": 1,
        "options": {},
        "totals": {},
        "splits": {"train": records},
    }
    (directory / shard_set.MANIFEST_NAME).write_text(json.dumps(manifest))
    return directory


def open_hollow(directory: Path) -> tuple[ShardSet, token_index.TokenIndex]:
    """Their columns are made at the first call, and kept."""
    shard_set.KEPT_FROM = 0
    shards = ShardSet(directory, "train")

    def write(writer):
        rng = np.random.default_rng(0)
        for first in range(0, len(shards), 100_000):
            count = min(100_000, len(shards) - first)
            writer.append_lengths("question_starts", np.full(count, 4))
            writer.append_lengths("answer_starts", rng.integers(80, 384, count))
            writer.append_lengths("first_turn", np.ones(count, np.int64))

    columns = made_once(directory / "tokens", token_index.COLUMNS, write)
    questions, answers = (
        token_index.Tokens(columns[f"{k}_ids"], columns[f"{k}_starts"]) for k in ("question", "answer")
    )
    return shards, token_index.TokenIndex(questions, answers, columns["first_turn"])


def memory_of_a_set(directory: Path) -> dict:
    """Bytes that a process has of its own, and of files that it could let go, once it has opened the set and
    planned."""
    began = of_process("RssAnon"), of_process("RssFile")
    shards, index = open_hollow(directory)
    opened = of_process("RssAnon") - began[0]
    keep = token_index.usable(index, shards.num_residues, 12, 8192, None)
    data = StageData(shards, index, [1] * 12, np.flatnonzero(keep))
    stage = StageConfig(
        **{**world.STAGE, "epochs": 1}, tokens_per_step=131_072, tokens_per_pack=8192, questions_per_group=1
    )
    made = TrainingPlan(data, stage, 42, shards_per_window=2)
    packs, _ = made.packs(made.num_steps // 2)
    gc.collect()
    return {
        "samples": len(data.samples), "opened": opened, "own": of_process("RssAnon") - began[0],
        "mapped": of_process("RssFile") - began[1], "steps": made.num_steps, "packs": len(packs),
    }  # fmt: skip


def memory_of_a_window(num_questions: int) -> dict:
    """Peak of a process that plans a window of proteins with a description each."""
    began = of_process("VmHWM")
    began_seconds = time.process_time()
    _, made = plan_epoch(pdb_samples(num_questions, 1, (80, 384)), 1, 8192, 16)
    return {
        "bytes": of_process("VmHWM") - began,
        "seconds": time.process_time() - began_seconds,
        "packs": len(made.pack_tokens),
    }


def in_a_process(measured: Callable[..., dict], *arguments) -> dict:
    """A fresh one, which holds the imports of this one and nothing else yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(measured, *arguments).result()


def memory(directory: Path, num_samples: int, window: int) -> dict:
    sets = []
    for count in (num_samples // 4, num_samples):
        hollow = write_hollow(directory / f"hollow{count}", count)
        in_a_process(memory_of_a_set, hollow)  # makes the columns
        sets.append(in_a_process(memory_of_a_set, hollow))
    base, per_sample = line([s["samples"] for s in sets], [s["own"] for s in sets])
    largest = in_a_process(memory_of_a_window, window)
    return {
        "sets": sets, "bytes_per_sample": per_sample, "window": largest,
        "bound_at_100_million": base + per_sample * MANY_SAMPLES + largest["bytes"],
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- all


def measure(directory: Path, args) -> dict:
    # First, while this process holds nothing of its own and no thread, so that it may fork.
    found_memory = memory(directory, args.samples, args.window)
    rates = in_a_process(index_rates, directory, args.turns)
    samples = pdb_samples(args.proteins)
    epochs = {
        f"{group} a group, {tokens}": plan_epoch(samples, group, tokens, PACKS_PER_STEP)[0] for group, tokens in CUTS
    }
    slowest = max(epoch["seconds"] for epoch in epochs.values())
    return {
        "ratio": WANTED_SECONDS / slowest,
        "slowest_seconds": slowest,
        "epochs": epochs,
        "fill_at_4096": min(epochs[f"{group} a group, {tokens}"]["fill"] for group, tokens in CUTS if tokens == 4096),
        "balance": balance(samples),
        "memory": found_memory,
        "index_turns_per_second": rates,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=132_092)
    parser.add_argument("--turns", type=int, default=60_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--window", type=int, default=plan.QUESTIONS_PER_WINDOW)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), args)
    world.print_figures(lines_of(args, figures), figures)


def lines_of(args, figures: dict) -> list[str]:
    rates, memory, shared = figures["index_turns_per_second"], figures["memory"], figures["balance"]
    small, large = memory["sets"]
    return [
        f"an epoch of {args.proteins:,} proteins with {world.QUESTIONS_PER_PROTEIN} questions each",
        *(
            f"  {name:22} {epoch['seconds']:5.2f} s, {epoch['packs']:,} packs, {epoch['fill']:.1%} full"
            for name, epoch in figures["epochs"].items()
        ),
        f"  2 H100 + 2 A100-40: {shared['packs_a_step']} packs a step, found near {PACKS_PER_STEP}, reach "
        f"{shared['share_of_the_sum']:.1%} of the summed speed",
        f"token ids of {args.turns:,} turns on two cores, and 3.7 million reckoned from them",
        *(f"  {name:22} {rate:9,.0f} turns/s: {ALL_TURNS / rate:,.0f} s" for name, rate in rates.items()),
        "memory of a set with its plan, the process's own (and mapped)",
        *(f"  {s['samples']:,} samples: {s['own'] / 1e6:.0f} MB ({s['mapped'] / 1e6:.0f} MB)" for s in (small, large)),
        f"  {memory['bytes_per_sample']:.1f} bytes a sample; a window of {args.window:,}: "
        f"{memory['window']['bytes'] / 1e6:,.0f} MB in {memory['window']['seconds']:.0f} s; 100 million samples: "
        f"{memory['bound_at_100_million'] / 1e9:.1f} GB by the line",
    ]


if __name__ == "__main__":
    main()
