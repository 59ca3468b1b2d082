"""What a checkpoint costs the training: how long the loop is held, and by how much steps are slowed while it is
written.

    python -m benchmarks.saving [--widths 4096 8192] [--steps 6] [--saves 3]

A real engine under ZeRO 2 in fp32 trains the projector of the paper's encoders (2560 and 512 wide) into an LLM of each
width: 12.6 million values and 151 MB of state at 4096. The LLM has one thin layer, so that a step takes about a second
on a CPU; a real step takes no less. Saves go through training.saver to a real disk, with checksums and fsync.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoConfig

from benchmarks import world
from proteingpt.cluster.calibrate import build, random_rows, timed_step
from proteingpt.cluster.shapes import TINY
from proteingpt.cluster.work import make_pack
from proteingpt.config import ModelConfig, StageConfig
from proteingpt.distributed import detect, start
from proteingpt.training.checkpoint import Progress
from proteingpt.training.engine import Engine
from proteingpt.training.saver import Saver

INTERVAL_SECONDS = 600.0
TOKENS = 300
DS_CONFIG = {"zero_optimization": {"stage": 2, "overlap_comm": False}}
WANTED = 0.005


def stall_share(held: float, slowed: float, quiet: float, writing: float) -> float:
    """Of the time, with a save each INTERVAL_SECONDS. held: seconds that the loop waits for a save; slowed, quiet:
    seconds of a step while one is written and without; writing: seconds that takes."""
    lost = held + writing * max(0.0, 1.0 - quiet / slowed)
    return lost / INTERVAL_SECONDS


def measure(width: int, num_steps: int, num_saves: int, device: torch.device, directory: Path) -> dict:
    shape = {**TINY, "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 1}
    model = build(AutoConfig.for_model("llama", **shape), ModelConfig(train="projector"), torch.float32, device)
    stage = StageConfig(**world.STAGE, tokens_per_step=TOKENS, tokens_per_pack=TOKENS, questions_per_group=29)
    engine = Engine(model, stage, DS_CONFIG)
    engine.module.train()
    pack = make_pack(TOKENS, shape["vocab_size"])
    rows = random_rows(pack, torch.float32, device)

    def step() -> float:
        return sum(timed_step(engine, pack, rows, device))

    for _ in range(2):
        step()
    saver, held, writing, slowed, quiet, num_bytes = Saver(directory, keep_last=1), [], [], [], [], 0
    for number in range(num_saves):
        quiet += [step() for _ in range(num_steps)]
        began = time.monotonic()
        state = engine.get_state()
        saver.start(state, Progress("align", number + 1, num_saves, "plan"))
        held.append(time.monotonic() - began)
        num_bytes = sum(value.nbytes for kind in state.values() for value in kind.values())
        del state
        while saver.thread.is_alive():
            slowed.append(step())
        writing.append(time.monotonic() - began - held[-1])  # to the end of a step: an upper bound
        saver.wait()
    engine.close()
    figures = {"held": median(held), "slowed": median(slowed), "quiet": median(quiet), "writing": median(writing)}
    share = stall_share(**figures)
    return {
        "width": width,
        "state_bytes": num_bytes,
        **{f"{name}_seconds": s for name, s in figures.items()},
        "stall_share": share,
    }


def text_of(result: dict) -> str:
    return (
        f"  {result['state_bytes'] / 1e6:5.0f} MB of state: the loop is held for {result['held_seconds']:.2f} s; then "
        f"a step of {result['quiet_seconds']:.2f} s takes {result['slowed_seconds']:.2f} s for "
        f"{result['writing_seconds']:.1f} s: {result['stall_share']:.3%} of the time at a save each 10 minutes "
        f"(wanted: below {WANTED:.1%})"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 8192], help="of the LLM")
    parser.add_argument("--steps", type=int, default=6, help="undisturbed ones before each save")
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    device = start(detect(os.environ))
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(w, args.steps, args.saves, device, Path(folder) / str(w)) for w in args.widths]
    lines = ["projector trained, ZeRO 2, fp32", *map(text_of, results)]
    world.print_figures(lines, {"ratio": max(result["stall_share"] for result in results), "sizes": results})


if __name__ == "__main__":
    main()
