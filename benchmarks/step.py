"""The frozen-LLM step: tokens a second, and its share of the device's peak (MFU).

    python -m benchmarks.step [--tokens 4096 8192 16384] [--checkpointing off on] [--steps 8]

A real step of the trainer's engine under ZeRO 2 in bf16: the projector trains, the LLM is frozen. On a GPU the LLM has
the shapes of Llama 3 8B and random weights, made on the device; on a CPU it is tiny, so that this stays able to run.
Packs hold proteins of PDB lengths with 29 questions each. Encoders' rows are made beforehand. Counted are 4 FLOPs for
each parameter and token that meet in a matrix product, forward and backward to the activations: a frozen weight has no
gradient. The head meets answer tokens only. Work done twice (activation checkpointing), and attention, whose share
stands apart, count for nothing. Peak memory stands beside what the first two sizes predict on a line (capacity).
"""

import argparse
import os
import time

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import world
from benchmarks.encoders import pdb_lengths
from proteingpt.config import StageConfig
from proteingpt.data.collate import Group, Pack, branch_length, collate
from proteingpt.devices import peak_flops
from proteingpt.distributed import detect, start
from proteingpt.model import attention
from proteingpt.model.projector import Projector
from proteingpt.model.protein_gpt import ProteinGPT
from proteingpt.protein import Protein, prefix_length
from proteingpt.training.capacity import line, peak_of
from proteingpt.training.engine import Engine

WIDTHS = (512, 2560)  # of ESM-IF1's rows and ESM-2 3B's
# Tokens of a prompt, as Llama 3's tokenizer cuts the published ones: before the protein, a question, an answer.
BEFORE, QUESTION, ANSWER = 6, 24, 4
LLAMA3_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)  # fmt: skip
TINY = {**LLAMA3_8B, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
DS_CONFIG = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "overlap_comm": False}}


def build(shape: dict, device: torch.device) -> ProteinGPT:
    """Random weights, made where they stay; the LLM frozen."""
    config = AutoConfig.for_model("llama", **shape)
    torch.manual_seed(0)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
        projector = Projector(*WIDTHS, config.hidden_size).to(torch.bfloat16)
    return ProteinGPT(projector, llm.requires_grad_(False))


def make_pack(tokens: int, vocabulary: int, seed: int = 0) -> Pack:
    """Proteins of PDB lengths with 29 questions each, the last ones cut so that the row has `tokens`, or nearly."""
    rng = np.random.default_rng((seed, tokens))
    turn, groups, room = branch_length(QUESTION, ANSWER), [], tokens

    def ids(count: int) -> list[int]:
        return rng.integers(3, vocabulary, count).tolist()

    for length in pdb_lengths(tokens, seed):
        longest = (room - turn - BEFORE) // prefix_length(1) if room > 4 * turn else 0
        if longest < 1:
            break
        residues = min(length, longest)
        protein = Protein(f"p{len(groups)}", "A", "G" * residues, np.zeros((residues, 3, 3), np.float32))
        room -= BEFORE + prefix_length(residues)
        turns = max(1, min(world.QUESTIONS_PER_PROTEIN, room // turn))
        room -= turns * turn
        groups.append(Group(protein.key, protein, ids(BEFORE), [(ids(QUESTION), ids(ANSWER)) for _ in range(turns)]))
    return collate(groups)


def matrix_flops(config, num_tokens: int, num_answer_tokens: int) -> float:
    """4 for each parameter and token of the layers' linear maps, and of the head's for answer tokens."""
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    attention_maps = 2 * width * head * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention_maps + 3 * width * config.intermediate_size
    return 4.0 * (layer * config.num_hidden_layers * num_tokens + width * config.vocab_size * num_answer_tokens)


def attention_flops(config, pack: Pack) -> float:
    """Scores and weighted values of the pairs that see each other: 4 FLOPs per pair and column forward, 8 backward."""
    pairs = 0
    for begin, end in zip(pack.group_starts, pack.group_starts[1:]):
        prefix, *branches = pack.branch_ids[begin:end].bincount().tolist()
        pairs += prefix * (prefix + 1) // 2 + sum(prefix * n + n * (n + 1) // 2 for n in branches)
    return 12.0 * pairs * config.hidden_size * config.num_hidden_layers


def step(engine: Engine, pack: Pack, rows, device: torch.device) -> float:
    """Seconds of one optimizer step."""
    began = time.perf_counter()
    with engine.accumulating(False):
        loss = engine.forward(pack.to(device), *rows)
        engine.backward(loss, pack.num_answer_tokens, is_last=True)
        float(loss.detach())  # as the trainer does, and so that the clock is that of the work
    engine.reduce()
    engine.step(1e-4)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_size(engine: Engine, pack: Pack, num_steps: int, device: torch.device, peak: float | None) -> dict:
    config, generator = engine.module.llm.config, torch.Generator(device).manual_seed(1)
    options = dict(device=device, dtype=torch.bfloat16, generator=generator)
    rows = [[torch.randn(len(p) + 2, width, **options) for p in pack.proteins] for width in WIDTHS]
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
        "attention_flops_over_counted": attention_flops(config, pack) / flops,
        "peak_bytes": peak_bytes,
    }


def with_prediction(results: list[dict]) -> list[dict]:
    """Each with the peak that the line through the first two sizes gives it."""
    ran = [r for r in results if "peak_bytes" in r]
    if len(ran) < 2:
        return results
    base, per_token = line([r["tokens"] for r in ran[:2]], [r["peak_bytes"] for r in ran[:2]])
    return [{**r, "predicted_peak_bytes": base + per_token * r["tokens"]} for r in results]


def measure(sizes: list[int], checkpointing: list[str], num_steps: int, device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shape = LLAMA3_8B if device.type == "cuda" else TINY
    model = build(shape, device)
    stage = StageConfig(**world.STAGE, tokens_per_step=max(sizes), tokens_per_pack=max(sizes), questions_per_group=29)
    engine = Engine(model, stage, DS_CONFIG)
    engine.module.train()
    runs = {}
    for choice in checkpointing:
        if choice == "on":
            model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.llm.gradient_checkpointing_disable()
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
    args = parser.parse_args()
    device = start(detect(os.environ))
    figures = measure(args.tokens, args.checkpointing, args.steps, device)
    model = f"{figures['layers']} layers of width {figures['width']}"
    lines = [f"{figures['device']}, {model}, projector trained, ZeRO 2, bf16"]
    lines += [text_of(choice, result) for choice, results in figures["checkpointing"].items() for result in results]
    world.print_figures(lines, figures)


if __name__ == "__main__":
    main()
