"""The frozen-LLM step: tokens a second, and its share of the device's peak (MFU).

    python -m benchmarks.step [--tokens 4096 8192 16384] [--checkpointing off on] [--steps 8] [--shape llama-3-8b]

A real step of the trainer's engine under ZeRO 2 in bf16: the projector trains, the LLM is frozen. On a GPU the LLM has
the shapes of Llama 3 8B and random weights, made on the device; on a CPU it is tiny, so that this stays able to run.
Packs hold proteins of PDB lengths with 29 questions each. Encoders' rows are made beforehand. Counted are 4 FLOPs for
each parameter and token that meet in a matrix product, forward and backward to the activations: a frozen weight has no
gradient. The head meets answer tokens only. Work done twice (activation checkpointing), and attention, whose share
stands apart, count for nothing. Peak memory stands beside what the first two sizes predict on a line (capacity).
"""

import argparse
import os

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks import world
from proteingpt.cluster.calibrate import WIDTHS, random_rows, set_checkpointing, timed_step
from proteingpt.cluster.calibrate import build as build_model
from proteingpt.cluster.shapes import LLAMA3_8B, SMALL, TINY, attention_flops, pack_pairs
from proteingpt.cluster.work import make_pack
from proteingpt.config import ModelConfig, StageConfig
from proteingpt.data.collate import Pack
from proteingpt.devices import peak_flops
from proteingpt.distributed import detect, start
from proteingpt.model.flops import matrix_flops
from proteingpt.model.protein_gpt import ProteinGPT
from proteingpt.training.capacity import line, peak_of
from proteingpt.training.engine import Engine

__all__ = ["TINY", "WIDTHS", "build", "make_pack", "matrix_flops"]

SHAPES = {"llama-3-8b": LLAMA3_8B, "tiny": TINY, "small": SMALL}
DS_CONFIG = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_comm": False}}


def build(shape: dict, device: torch.device) -> ProteinGPT:
    """Random weights, made where they stay; the LLM frozen."""
    return build_model(AutoConfig.for_model("llama", **shape), ModelConfig(train="projector"), torch.bfloat16, device)


def step(engine: Engine, pack: Pack, rows, device: torch.device) -> float:
    """Seconds of one optimizer step."""
    return sum(timed_step(engine, pack, rows, device))


def measure_size(engine: Engine, pack: Pack, num_steps: int, device: torch.device, peak: float | None) -> dict:
    config, rows = engine.module.llm.config, random_rows(pack, torch.bfloat16, device)
    try:
        peak_bytes = peak_of(lambda: [step(engine, pack, rows, device) for _ in range(2)], device)  # compiles too
        seconds = float(np.median([step(engine, pack, rows, device) for _ in range(num_steps)]))
    except torch.OutOfMemoryError:
        engine.drop()
        return {"tokens": pack.num_tokens, "out_of_memory": True}
    flops = matrix_flops(config, pack.num_tokens, len(pack.targets))
    return {
        "tokens": pack.num_tokens,
        "answer_tokens": len(pack.targets),
        "seconds": seconds,
        "tokens_per_second": pack.num_tokens / seconds,
        "mfu": flops / seconds / peak if peak else None,
        "attention_flops_over_counted": attention_flops(config, sum(pack_pairs(pack))) / flops,
        "peak_bytes": peak_bytes,
    }


def with_prediction(results: list[dict]) -> list[dict]:
    """Each with the peak that the line through the first two sizes gives it."""
    ran = [r for r in results if "peak_bytes" in r]
    if len(ran) < 2:
        return results
    base, per_token = line([r["tokens"] for r in ran[:2]], [r["peak_bytes"] for r in ran[:2]])
    return [{**r, "predicted_peak_bytes": base + per_token * r["tokens"]} for r in results]


def measure(shape: dict, sizes: list[int], checkpointing: list[str], num_steps: int, device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    model = build(shape, device)
    stage = StageConfig(**world.STAGE, tokens_per_step=max(sizes), tokens_per_pack=max(sizes), questions_per_group=29)
    engine = Engine(model, stage, DS_CONFIG)
    engine.module.train()
    runs = {}
    for choice in checkpointing:
        set_checkpointing(model.llm, choice == "on")
        packs = [make_pack(size, shape["vocab_size"]) for size in sorted(sizes)]
        runs[choice] = with_prediction([measure_size(engine, p, num_steps, device, peak_flops(name)) for p in packs])
    engine.close()
    reached = [result["mfu"] for results in runs.values() for result in results if result.get("mfu")]
    return {"ratio": max(reached, default=None), "device": name, "layers": shape["num_hidden_layers"],
            "width": shape["hidden_size"], "checkpointing": runs}  # fmt: skip


def text_of(choice: str, result: dict) -> str:
    start_of_line = f"  checkpointing {choice:3} {result['tokens']:6} tokens"
    if result.get("out_of_memory"):
        return f"{start_of_line}: out of memory"
    mfu = f"MFU {result['mfu']:.1%}" if result["mfu"] else "no known peak"
    predicted = result.get("predicted_peak_bytes", float("nan")) / 2**30
    return (
        f"{start_of_line}: {result['seconds']:7.3f} s, {result['tokens_per_second']:9.0f} tokens/s, {mfu}, attention "
        f"{result['attention_flops_over_counted']:.1%} on top, peak {result['peak_bytes'] / 2**30:.2f} GB "
        f"(line: {predicted:.2f})"
    )


def main():
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384] if gpu else [300, 600, 900])
    parser.add_argument("--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--steps", type=int, default=8 if gpu else 2)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b" if gpu else "tiny")
    args = parser.parse_args()
    device = start(detect(os.environ))
    figures = measure(SHAPES[args.shape], args.tokens, args.checkpointing, args.steps, device)
    model = f"{figures['layers']} layers of width {figures['width']}"
    lines = [f"{figures['device']}, {model}, projector trained, ZeRO 2, bf16"]
    lines += [text_of(choice, result) for choice, results in figures["checkpointing"].items() for result in results]
    world.print_figures(lines, figures)


if __name__ == "__main__":
    main()
