"""Two unlike ranks: tokens per second together, over the sum of what each does alone.

    python -m benchmarks.mixed_devices [--blocks 16] [--packs 96]

Two real ranks under ds_configs/zero2.json, each on a core of its own. The slow one is stopped from outside for 5 ms of
every 10, whatever it is at: a device that gives it half its time, which no clock in the trainer knows of. Three pairs
take turns of some steps each, since a shared machine is faster in one minute than in the next: each rank alone, as two
worlds of one, counted while both run, so that what the cores take from each other (memory, caches, clock) they take
here as well; together with measured speeds; together with an equal split. `ratio` is together over the sum of the
alone, over all turns; `limit` what whole packs and those two speeds imply, with communication free. Then a simulation
of larger clusters, with published rates and noise.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from benchmarks import world
from proteingpt.config import DevicesConfig
from proteingpt.data import shares as sharing
from proteingpt.training.balance import LAG, MEMORY, steady
from proteingpt.training.restarts import free_port

REPOSITORY = Path(__file__).parents[1]
TOKENS_PER_PACK = 768
MOST_STEPS = 10_000
HALF_PERIOD_SECONDS = 0.005
WARM_STEPS = 20  # until the ranks share out by what they have measured of each other
# Steps of a turn, of the fast rank and of the slow. Alone, the fast one has more in the same time, and some to spare.
ALONE, MEASURED, EQUAL = [4, 1], [3, 3], [2, 2]
PR_SET_PDEATHSIG = 1
# Tokens per second of 7B training on one GPU (LLM-Foundry's published table).
H100, A100_40 = 10_643.0, 3_679.0


class Handicap(threading.Thread):
    """Halves what processes get of their core. A thread, at home on that core, that stops them and lets them go on."""

    def __init__(self, core: int, processes: list[subprocess.Popen]):
        super().__init__(daemon=True)
        self.core, self.processes, self.over = core, processes, threading.Event()

    def run(self):
        os.sched_setaffinity(0, {self.core})
        while not self.over.is_set():
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for process in self.processes:
                    process.send_signal(number)
                time.sleep(HALF_PERIOD_SECONDS)

    def end(self):
        """They run on."""
        self.over.set()
        self.join()


# -------------------------------------------------------------------------------------------------------- a rank


class Over(Exception):
    """No more steps are asked for."""


class Turns:
    """Steps as they are asked for: a line of standard input says how many."""

    def __init__(self):
        self.left = 0

    def take(self):
        """Waits until a step is due."""
        if not self.left:
            self.left = int(sys.stdin.readline() or 0)
        if not self.left:
            raise Over
        self.left -= 1


def work(directory: Path, core: int, num_packs: int, balance_mode: str):
    """One rank: the trainer's own plan, engine, balance and loop. Each step's begin, end and tokens on a line; what the
    ranks found out of each other when it is over."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process ends with its starter by nothing else
    os.sched_setaffinity(0, {core})
    out = os.fdopen(os.dup(1), "w")  # libraries that print shall not print in between
    os.dup2(2, 1)
    import torch

    from proteingpt.config import EncodersConfig, ModelConfig, StageConfig, read_ds_config
    from proteingpt.data.index import build_index
    from proteingpt.data.loader import Share, StageData, TrainingPlan, prefetch
    from proteingpt.data.prompts import TEMPLATES, Prompt
    from proteingpt.data.shards import ShardSet
    from proteingpt.distributed import detect, start
    from proteingpt.encoders.pair import Encoders, Remembering
    from proteingpt.model import assemble
    from proteingpt.training.balance import Balance
    from proteingpt.training.engine import Engine, precision
    from proteingpt.training.loop import train

    torch.set_num_threads(1)
    rank = detect(os.environ)
    device = start(rank)
    stage = StageConfig(
        **{**world.STAGE, "epochs": 10_000}, max_steps=MOST_STEPS, tokens_per_step=num_packs * TOKENS_PER_PACK,
        tokens_per_pack=TOKENS_PER_PACK, questions_per_group=8,
    )  # fmt: skip
    prompt = Prompt(assemble.load_tokenizer(str(directory / "llm")), TEMPLATES["released", "instruct"], 256)
    shards = ShardSet(directory, "train")
    data = StageData(shards, build_index(shards, "instruct", prompt), prompt.prefix_ids, np.arange(len(shards)))
    plan = TrainingPlan(data, stage, seed=0)
    files = EncodersConfig(
        esm2=str(directory / "esm2_demo.pt"), esm_if1=str(directory / "esm_if1_demo.pt"), dtype="float32"
    )
    pair = Encoders.load(files, device)
    ds_config = read_ds_config(str(REPOSITORY / "ds_configs" / "zero2.json"))
    model = assemble.build_model(
        ModelConfig(llm=str(directory / "llm"), train="projector"), pair.structure.width, pair.sequence.width,
        precision(ds_config), seed=0,
    )  # fmt: skip
    engine = Engine(model, stage, ds_config)
    balance = Balance(DevicesConfig(balance=balance_mode), device)
    reports, waiting, turns = [], [], Turns()

    def tell(what):
        print(json.dumps(what), file=out, flush=True)

    class Recorder:
        def step(self, number, report):
            reports.append(report)
            tell([time.monotonic() - report.seconds, time.monotonic(), report.num_tokens])

        def ranks(self, step, exchanged):
            if step >= WARM_STEPS + DevicesConfig().exchange_every_steps:
                waiting.append(exchanged.waiting)

    def share(step: int) -> Share:
        return Share(rank.rank, balance.speeds(step), [None] * rank.world_size, False)

    def read(first: int):
        return prefetch(lambda step: plan.work(step, share(step)), first, MOST_STEPS)

    engine.module.train()
    encoders = Remembering(pair, 2**30)
    with suppress(Over):
        turns.take()
        train(
            engine, encoders, read, stage, Recorder(), balance, device, first_step=0, num_steps=MOST_STEPS,
            after_step=lambda step: turns.take(),
        )  # fmt: skip
    counted = reports[WARM_STEPS:] or reports
    tell(
        {
            "waiting_share": sum(r.waiting_seconds for r in counted) / sum(r.seconds for r in counted),
            "speeds": balance.agreed[-1][1],
            "not_computing": np.mean(waiting, axis=0).tolist() if waiting else None,  # of each rank
            "pack_tokens": [plan.packs(step)[1] for step in range(len(reports))],
        }
    )


# ------------------------------------------------------------------------------------------------- those who start it


def start_world(directory: Path, cores: list[int], num_packs: int, balance: str) -> Iterator[subprocess.Popen]:
    """A rank on each core. It does nothing before it is asked."""
    port = free_port()
    for rank, core in enumerate(cores):
        env = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(cores)), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.mixed_devices", "--worker", str(directory), "--core", str(core)]
        command += ["--packs", str(num_packs), "--balance", balance]
        with open(directory / "errors.log", "a") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
            yield subprocess.Popen(command, env=env, cwd=REPOSITORY, **pipes)


def turn(ranks: list[subprocess.Popen], num_steps: list[int]) -> list[list[list[float]]]:
    """Each rank does so many steps, all from now on: (began, ended, tokens) of each."""
    for rank, count in zip(ranks, num_steps, strict=True):
        rank.stdin.write(f"{count}\n")
        rank.stdin.flush()
    return [[json.loads(rank.stdout.readline()) for _ in range(count)] for rank, count in zip(ranks, num_steps)]


def until(spans: list[list[float]], ended: float) -> list[list[float]]:
    """The steps that had ended by then; one at least."""
    return [span for span in spans if span[1] <= ended] or spans[:1]


def finish(rank: subprocess.Popen) -> dict:
    out, _ = rank.communicate(timeout=300)  # closes its input, which ends it
    return json.loads(out.splitlines()[-1])


def rate(turns: list[list[list[float]]]) -> float:
    """Tokens per second over turns of steps (began, ended, tokens)."""
    tokens = sum(tokens for spans in turns for *_, tokens in spans)
    return tokens / sum(spans[-1][1] - spans[0][0] for spans in turns)


def limit(pack_tokens: list[list[int]], speeds: list[float]) -> float:
    """Share of the summed speeds that whole packs allow, shared out by those very speeds, nothing else costing time."""
    total = sum(map(sum, pack_tokens))
    seconds = 0.0
    for tokens in pack_tokens:
        shares = sharing.assign(tokens, speeds)
        seconds += max(sum(tokens[p] for f in share for p in f) / speed for share, speed in zip(shares, speeds))
    return total / seconds / sum(speeds)


def measure(directory: Path, num_blocks: int, num_packs: int) -> dict:
    world.write_world(directory, 24, width=96, num_layers=2, longest=150)
    fast, slow = sorted(os.sched_getaffinity(0))[:2]
    ranks, blocks, handicap = [], [], None
    try:
        both = [fast, slow]
        for cores, balance in (([fast], "equal"), ([slow], "equal"), (both, "measured"), (both, "equal")):
            ranks += start_world(directory, cores, num_packs, balance)
        alone, measured, equal = ranks[:2], ranks[2:4], ranks[4:]
        handicap = Handicap(slow, [alone[1], measured[1], equal[1]])
        handicap.start()
        for pair, num_steps in ((alone, [1, 1]), (equal, [1, 1]), (measured, [WARM_STEPS] * 2)):
            turn(pair, num_steps)
        for number in range(num_blocks):
            print(f"block {number + 1} of {num_blocks}", file=sys.stderr, flush=True)
            turns = [turn(pair, steps) for pair, steps in ((alone, ALONE), (measured, MEASURED), (equal, EQUAL))]
            assert handicap.is_alive()
            of_fast, of_slow = turns[0]
            blocks.append([until(of_fast, of_slow[-1][1]), of_slow, turns[1][0], turns[2][0]])
        handicap.end()
        told = [finish(rank) for rank in ranks][2]
    except (ValueError, IndexError, OSError):
        sys.exit(f"a rank has failed: {(directory / 'errors.log').read_text()[-2000:]}")
    finally:
        if handicap:
            handicap.end()
        for rank in ranks:
            rank.kill()
            rank.wait()
    return figures_of(blocks, told)


def figures_of(blocks: list[list[list[list[float]]]], told: dict) -> dict:
    """blocks: in each the spans of fast alone, slow alone, both with measured speeds, both with an equal split. told:
    what the ranks with measured speeds said at the end."""
    fast, slow, together, equal = (rate([block[way] for block in blocks]) for way in range(4))
    by_block = [rate([block[2]]) / (rate([block[0]]) + rate([block[1]])) for block in blocks]
    return {
        "ratio": together / (fast + slow),
        "limit": limit(told["pack_tokens"], [fast, slow]),
        "equal_split": equal / (fast + slow),
        "equal_split_limit": 2 * min(fast, slow) / (fast + slow),
        "slow_over_fast": slow / fast,
        "measured_slow_over_fast": told["speeds"][1] / told["speeds"][0],
        "together_tokens_per_second": together,
        "alone_tokens_per_second": [fast, slow],
        "waiting_for_data_share": told["waiting_share"],
        "not_computing_share": told["not_computing"],
        "ratio_by_block": by_block,
    }


# ------------------------------------------------------------------------------------------------------- simulation


def simulate(speeds: list[float], num_packs: int, noise: float, steps: int = 200, seed: int = 0) -> float:
    """Share of the summed speed that is reached, when each rank's speed wanders by `noise` (log-normal, each step) and
    equal packs are handed out by what the trainer would have agreed upon, exchanged and in force as there.
    Communication costs nothing here."""
    rng = np.random.default_rng((seed, len(speeds), num_packs))
    true = np.array(speeds) * np.exp(noise * rng.normal(size=(steps, len(speeds))))
    counts, ahead, reached = counts_of(num_packs, speeds), {}, []
    for step in range(steps):
        if step and step % DevicesConfig().exchange_every_steps == 0:
            measured = [steady(rates) for rates in true[max(0, step - MEMORY) : step].T]
            ahead[step + LAG] = counts_of(num_packs, measured)
        counts = ahead.pop(step, counts)
        reached.append(num_packs / sum(speeds) / (counts / true[step]).max())
    return float(np.mean(reached))


def counts_of(num_packs: int, speeds: list[float]) -> np.ndarray:
    """int64: how many equal packs each rank is given."""
    return np.array([sum(map(len, share)) for share in sharing.assign([1] * num_packs, speeds)])


def simulations() -> dict:
    paper = [H100] * 2 + [A100_40] * 2
    nodes = [H100] * 256 + [A100_40] * 256  # 64 nodes of 8
    return {
        "2xH100+2xA100-40, 64 packs, 3 % noise": simulate(paper, 64, 0.03),
        "2xH100+2xA100-40, equal split": 4 * min(paper) / sum(paper),
        "64 mixed nodes of 8, 8192 packs, 3 % noise": simulate(nodes, 8192, 0.03, steps=40),
        "64 mixed nodes of 8, equal split": len(nodes) * min(nodes) / sum(nodes),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=16, help="turns of all pairs, half a minute each [16]")
    parser.add_argument("--packs", type=int, default=96, help="packs of 768 tokens in a step [96]")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--balance", default="measured", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.core, args.packs, args.balance)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its ranks are ended with it
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), args.blocks, args.packs)
    figures["simulated"] = simulations()
    fast, slow = figures["alone_tokens_per_second"]
    lines = [
        f"alone at the same time: fast {fast:,.0f} tokens/s, slow {slow:,.0f}",
        f"together {figures['ratio']:.3f} of the sum (whole packs allow {figures['limit']:.3f}), by block "
        + ", ".join(f"{ratio:.3f}" for ratio in figures["ratio_by_block"]),
        f"equal split {figures['equal_split']:.3f} (allowed: {figures['equal_split_limit']:.3f})",
        *(f"simulated, {name}: {share:.3f} of the sum" for name, share in figures["simulated"].items()),
    ]
    world.print_figures(lines, figures)


if __name__ == "__main__":
    main()
