"""A run on two ranks that meets a real fault every half minute, and what is left of it: python -m benchmarks.soak

Before it, the same run without faults: the final weights must be equal to the bit. Packs are shared out equally, since
a measured speed, which enters the order of a sum, would not repeat itself.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.forked_ranks import ForkedRank
from proteingpt.training import restarts
from proteingpt.training.checkpoint import checkpoints
from proteingpt.training.ledger import NAME, read_lines, summary
from proteingpt.training.signals import REQUEUE

REPOSITORY = Path(__file__).parents[1]
NUM_RANKS = 2
HANG_SECONDS = 5
EVERY_STEPS = 20
WARM_UP_STEPS = (20, 60, 160)  # the first makes the data


def arguments(output: str, num_steps: int) -> list[str]:
    """A demo whose second stage has `num_steps`; a checkpoint each EVERY_STEPS, which are seconds."""
    settings = {
        "--ds_config": REPOSITORY / "ds_configs" / "zero2.json", "--output": output, "--demo.num_proteins": 40,
        "--evaluation.num_proteins": 2, "--align.max_steps": 2, "--instruct.max_steps": num_steps,
        "--instruct.epochs": 100_000, "--instruct.samples_per_step": 16, "--checkpoint.every_steps": EVERY_STEPS,
        "--devices.hang_seconds": HANG_SECONDS, "--devices.balance": "equal",
    }  # fmt: skip
    return [str(part) for pair in settings.items() for part in pair]


class Chaos(threading.Thread):
    """Every `every` seconds one of FAULTS, drawn from the seed, upon ranks that are in the midst of training."""

    def __init__(self, run: Path, every: float, seed: int):
        super().__init__(daemon=True)
        self.run_directory, self.every, self.draw = run, every, random.Random(seed)
        self.ranks: list[ForkedRank] = []
        self.done: list[str] = []
        self.over = threading.Event()

    def run(self):
        names = []
        while not self.over.wait(self.every):
            names = names or self.draw.sample(list(FAULTS), len(FAULTS))  # each kind before one comes again
            victim = self.draw.randrange(NUM_RANKS)
            if self.is_training() and all(rank.poll() is None for rank in self.ranks):
                name = names.pop()
                FAULTS[name](self, victim)
                self.done.append(name)
                print(f"  {name}, rank {victim}", file=sys.stderr, flush=True)

    def is_training(self) -> bool:
        lines = read_lines(self.run_directory / NAME)
        return bool(lines) and lines[-1]["steps"].get("instruct", 0) > 0 and not lines[-1]["ended"]

    def newest(self) -> Path | None:
        return next(iter(checkpoints(self.run_directory / "instruct")), None)


def send(number: int) -> Callable[[Chaos, int], None]:
    return lambda chaos, victim: chaos.ranks[victim].send_signal(number)


def kill_while_saving(chaos: Chaos, victim: int):
    """Rank 0 saves: it is killed when a checkpoint is half written, if one comes to be within some seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not list((chaos.run_directory / "instruct").glob(".step-*")):
        time.sleep(0.0005)
    chaos.ranks[0].kill()


def damage(change: Callable[[bytes], bytes], name: str) -> Callable[[Chaos, int], None]:
    """A file of the newest checkpoint is broken, then a rank dies."""

    def fault(chaos: Chaos, victim: int):
        newest = chaos.newest()
        if newest is not None and len(checkpoints(newest.parent)) > 1:
            (newest / name).write_bytes(change((newest / name).read_bytes()))
        chaos.ranks[victim].kill()

    return fault


def make_stale(chaos: Chaos, victim: int):
    (chaos.run_directory / "instruct" / "latest").write_text("step-00000001\n")
    chaos.ranks[victim].kill()


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


FAULTS: dict[str, Callable[[Chaos, int], None]] = {
    "SIGKILL": send(signal.SIGKILL),
    "SIGTERM": send(signal.SIGTERM),
    "SIGUSR1": send(signal.SIGUSR1),
    "SIGSTOP": send(signal.SIGSTOP),
    "SIGKILL while saving": kill_while_saving,
    "checkpoint truncated": damage(lambda content: content[: len(content) // 2], "exp_avg.safetensors"),
    "checkpoint bit-flipped": damage(flipped, "weights.safetensors"),
    "latest stale": make_stale,
}


def run(folder: Path, output: str, num_steps: int, chaos: Chaos | None) -> float:
    """To its end, started again after each fault as --max-restarts and a batch script do. Seconds of wall clock."""
    argv, log = arguments(output, num_steps), folder / f"{output}.log"
    began = time.monotonic()

    def start(env: dict[str, str]) -> ForkedRank:
        rank = ForkedRank(argv, env, folder, log)
        if chaos is not None:
            chaos.ranks = [*chaos.ranks[-NUM_RANKS + 1 :], rank]
        return rank

    while True:
        code = restarts.supervise(start, NUM_RANKS, max_restarts=10**6)
        if code != REQUEUE:
            break
    if code:
        sys.exit(f"soak: {output} ended with {code}\n{log.read_text()[-3000:]}")
    return time.monotonic() - began


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(folder / "instruct")[0] / "weights.safetensors")


def soak(folder: Path, minutes: float, every: float, seed: int) -> dict:
    os.environ["DS_ACCELERATOR"] = "cpu"
    _, few, many = (run(folder, f"warm-up-{steps}", steps, None) for steps in WARM_UP_STEPS)
    step_seconds = max(many - few, 1.0) / (WARM_UP_STEPS[2] - WARM_UP_STEPS[1])  # saves included
    # A fault costs another start, half of the steps between two checkpoints, and where it is a hang the time to see it.
    lost = few - (WARM_UP_STEPS[1] - EVERY_STEPS / 2) * step_seconds + HANG_SECONDS / len(FAULTS)
    num_steps = max(40, int(minutes * 60 / step_seconds * every / (every + lost)))
    print(f"{num_steps} steps without faults", file=sys.stderr, flush=True)
    calm_seconds = run(folder, "calm", num_steps, None)
    chaos = Chaos(folder / "rough", every, seed)
    chaos.start()
    print(f"{num_steps} steps, a fault every {every:g} s", file=sys.stderr, flush=True)
    rough_seconds = run(folder, "rough", num_steps, chaos)
    chaos.over.set()
    chaos.join()
    calm, rough = final_weights(folder / "calm"), final_weights(folder / "rough")
    totals = summary(read_lines(folder / "rough" / NAME))
    same = calm.keys() == rough.keys() and all(torch.equal(calm[name], rough[name]) for name in calm)
    return {
        "steps": num_steps,
        "seconds": round(rough_seconds, 1),
        "seconds_without_faults": round(calm_seconds, 1),
        "goodput": totals["goodput"],
        "faults_survived": len(chaos.done),
        "faults": {name: chaos.done.count(name) for name in FAULTS},
        "starts": totals["starts"],
        "steps_lost": totals["replayed_steps"],
        "saving_share": round(totals["seconds_by_part"]["saving"] / totals["seconds"], 4),
        "seconds_by_part": totals["seconds_by_part"],
        "weights_equal": same,
    }


def text_of(result: dict) -> str:
    return (
        f"{result['faults_survived']} faults survived in {result['seconds']:.0f} s "
        f"({result['seconds_without_faults']:.0f} s without), goodput {result['goodput']:.1%}, {result['steps_lost']} "
        f"of {result['steps']} steps lost and trained again, final weights "
        f"{'equal to the bit' if result['weights_equal'] else 'DIFFER'}"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the run with faults, about")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=1, help="draws the faults")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), given.minutes, given.every, given.seed)
    print(text_of(result))
    print(json.dumps(result))
    return 0 if result["weights_equal"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
