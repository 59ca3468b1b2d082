"""Two unlike ranks: tokens per second together, over the sum of what each does alone.

    python -m benchmarks.mixed_devices [--steps 40] [--warm 15] [--rounds 3]

Two real ranks under ds_configs/zero2.json, each on a core of its own. The slow one shares its core with a process that
only burns time, so it has half of it: a handicap from outside, which no clock in the trainer knows of. A round is three
runs, one after another: each alone, as two worlds of one *at the same time*, so that what the cores take from each
other (memory, caches, clock) they take here as well; together with measured speeds; together with an equal split.
`ratio` is the median over the rounds of together over the sum of the alone of the same round, `limit` what whole packs
and those two speeds imply, with communication free. Then a simulation of larger clusters, with published rates and
noise.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import world
from proteingpt.config import DevicesConfig
from proteingpt.data import shares as sharing
from proteingpt.training.balance import LAG, MEMORY

REPOSITORY = Path(__file__).parents[1]
# Tokens per second of 7B training on one GPU (LLM-Foundry's published table).
H100, A100_40 = 10_643.0, 3_679.0


def burn(core: int):
    os.sched_setaffinity(0, {core})
    while True:
        pass


def start_rank(
    directory: Path, rank: int, world_size: int, core: int, port: int, steps: tuple[int, int], balance: str
) -> subprocess.Popen:
    """steps: all, and those of them that are not counted."""
    env = {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.mixed_devices", "--worker", str(directory), "--core", str(core)]
    command += ["--steps", str(steps[0]), "--warm", str(steps[1]), "--balance", balance]
    return subprocess.Popen(
        command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def result(process: subprocess.Popen) -> dict:
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, f"a rank of the benchmark failed with exit code {process.returncode}"
    return json.loads(out.splitlines()[-1])


def work(directory: Path, core: int, steps: int, warm: int, balance_mode: str) -> dict:
    """One rank: the trainer's own plan, engine, balance and loop. Tokens per second after the warm steps."""
    os.sched_setaffinity(0, {core})
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
        **{**world.STAGE, "epochs": 1000}, max_steps=steps, tokens_per_step=96 * 768, tokens_per_pack=768,
        questions_per_group=8,
    )
    prompt = Prompt(assemble.load_tokenizer(str(directory / "llm")), TEMPLATES["released", "instruct"], 256)
    shards = ShardSet(directory, "train")
    data = StageData(shards, build_index(shards, "instruct", prompt), prompt.prefix_ids, np.arange(len(shards)))
    steps_plan = TrainingPlan(data, stage, seed=0)
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
    reports, waiting = [], []

    class Recorder:
        def step(self, number, report):
            reports.append(report)

        def ranks(self, step, exchanged):
            waiting.append(exchanged.waiting)

    def share(step: int) -> Share:
        return Share(rank.rank, balance.speeds(step), [None] * rank.world_size, False)

    def read(first: int):
        return prefetch(lambda step: steps_plan.work(step, share(step)), first, steps)

    engine.module.train()
    encoders = Remembering(pair, 2**30)
    train(
        engine, encoders, read, stage, Recorder(), balance, device, first_step=0, num_steps=steps,
        after_step=lambda step: None,
    )  # fmt: skip
    counted = reports[warm:]
    return {
        "tokens_per_second": sum(r.num_tokens for r in counted) / sum(r.seconds for r in counted),
        "waiting_share": sum(r.waiting_seconds for r in counted) / sum(r.seconds for r in counted),
        "speeds": balance.agreed[-1][1],
        "not_computing": waiting[-1] if waiting else None,
        "pack_tokens": [steps_plan.packs(step)[1] for step in range(warm, steps)],
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(directory: Path, cores: list[int], steps: tuple[int, int], balance: str) -> dict:
    port = free_port()
    ranks = [start_rank(directory, r, 2, core, port, steps, balance) for r, core in enumerate(cores)]
    return [result(process) for process in ranks][0]


def limit(pack_tokens: list[list[int]], speeds: list[float]) -> float:
    """Share of the summed speeds that whole packs allow, shared out by those very speeds, nothing else costing time."""
    total = sum(map(sum, pack_tokens))
    seconds = 0.0
    for tokens in pack_tokens:
        shares = sharing.assign(tokens, speeds)
        seconds += max(sum(tokens[p] for f in share for p in f) / speed for share, speed in zip(shares, speeds))
    return total / seconds / sum(speeds)


def one_round(directory: Path, fast: int, slow: int, steps: tuple[int, int]) -> dict:
    ranks = [start_rank(directory, 0, 1, core, free_port(), steps, "equal") for core in (fast, slow)]
    alone = [result(process)["tokens_per_second"] for process in ranks]
    measured = together(directory, [fast, slow], steps, "measured")
    equal = together(directory, [fast, slow], steps, "equal")
    return {
        "ratio": measured["tokens_per_second"] / sum(alone),
        "limit": limit(measured["pack_tokens"], alone),
        "equal_split": equal["tokens_per_second"] / sum(alone),
        "equal_split_limit": 2 * min(alone) / sum(alone),
        "slow_over_fast": alone[1] / alone[0],
        "measured_slow_over_fast": measured["speeds"][1] / measured["speeds"][0],
        "together_tokens_per_second": measured["tokens_per_second"],
        "alone_tokens_per_second": alone,
        "waiting_for_data_share": measured["waiting_share"],
        "not_computing_share": measured["not_computing"],
    }


def measure(directory: Path, steps: tuple[int, int], num_rounds: int) -> dict:
    world.write_world(directory, 24, width=96, num_layers=2, longest=150)
    fast, slow = sorted(os.sched_getaffinity(0))[:2]
    burner = multiprocessing.Process(target=burn, args=(slow,), daemon=True)
    burner.start()
    try:
        rounds = [one_round(directory, fast, slow, steps) for _ in range(num_rounds)]
    finally:
        burner.terminate()
        burner.join()
    plain = [name for name, value in rounds[0].items() if isinstance(value, float)]
    return {**{name: median(done[name] for done in rounds) for name in plain}, "rounds": rounds}


# ------------------------------------------------------------------------------------------------------- simulation


def simulate(speeds: list[float], num_packs: int, noise: float, steps: int = 200, seed: int = 0) -> float:
    """Share of the summed speed that is reached, when each rank's speed wanders by `noise` (log-normal, each step) and
    equal packs are handed out by what the trainer would have agreed upon: medians of the last steps, exchanged and in
    force as there. Communication costs nothing here."""
    rng = np.random.default_rng((seed, len(speeds), num_packs))
    true = np.array(speeds) * np.exp(noise * rng.normal(size=(steps, len(speeds))))
    counts, ahead, reached = counts_of(num_packs, speeds), {}, []
    for step in range(steps):
        if step and step % DevicesConfig().exchange_every_steps == 0:
            measured = np.median(true[max(0, step - MEMORY) : step], axis=0)
            ahead[step + LAG] = counts_of(num_packs, measured.tolist())
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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=15, help="steps until the ranks have measured each other [15]")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--balance", default="measured", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, args.core, args.steps, args.warm, args.balance)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what burns time is ended with it
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), (args.steps, args.warm), args.rounds)
    figures["simulated"] = simulations()
    lines = [
        *(
            "alone at the same time: fast {:,.0f} tokens/s, slow {:,.0f}; together {:.3f} of the sum (whole packs "
            "allow {:.3f}); equal split {:.3f} (allowed: {:.3f})".format(
                *done["alone_tokens_per_second"],
                *(done[name] for name in ("ratio", "limit", "equal_split", "equal_split_limit")),
            )
            for done in figures["rounds"]
        ),
        f"median: {figures['ratio']:.3f} of the sum, equal split {figures['equal_split']:.3f}",
        *(f"simulated, {name}: {share:.3f} of the sum" for name, share in figures["simulated"].items()),
    ]
    world.print_figures(lines, figures)


if __name__ == "__main__":
    main()
