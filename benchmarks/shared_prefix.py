"""Questions per second: shared-prefix packs against one question per forward, as the published code trains.

    python -m benchmarks.shared_prefix [--proteins 12] [--width 96] [--layers 2]

Both train the projector of the same model on the same proteins and questions: forward and backward, no optimizer step.
The encoders' rows are made beforehand for both, as the published code reads them from files. The two run in turns,
protein by protein, so that a busy machine slows both.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import world
from proteingpt.config import EncodersConfig, ModelConfig
from proteingpt.data.collate import Group, collate
from proteingpt.data.index import build_index
from proteingpt.data.loader import StageData
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardSet
from proteingpt.encoders.pair import Encoders
from proteingpt.model import assemble


def measure(directory: Path, num_proteins: int, width: int, num_layers: int, device: torch.device) -> dict:
    world.write_world(directory, num_proteins, width=width, num_layers=num_layers)
    shards = ShardSet(directory, "train")
    prompt = Prompt(assemble.load_tokenizer(str(directory / "llm")), TEMPLATES["released", "instruct"], 256)
    data = StageData(shards, build_index(shards, "instruct", prompt), prompt.prefix_ids, range(len(shards)))
    config = EncodersConfig(
        esm2=str(directory / "esm2_demo.pt"), esm_if1=str(directory / "esm_if1_demo.pt"), dtype="float32"
    )
    encoders = Encoders.load(config, device)
    model = assemble.build_model(
        ModelConfig(llm=str(directory / "llm"), train="projector"),
        encoders.structure.width,
        encoders.sequence.width,
        torch.bfloat16 if device.type == "cuda" else torch.float32,
        seed=0,
    ).to(device)
    seconds, tokens = {"packed": 0.0, "one by one": 0.0}, {"packed": 0, "one by one": 0}
    questions = tuple(range(world.QUESTIONS_PER_PROTEIN))
    for sample in range(-1, num_proteins):  # the first once more before the clock counts
        group = data.group(max(sample, 0), questions)
        rows = encoders.encode([group.protein])
        apart = [Group(group.key, group.protein, group.prefix_ids, [branch]) for branch in group.branches]
        for way, packs in (("packed", [collate([group])]), ("one by one", [collate([one]) for one in apart])):
            spent = timed(model, packs, rows, device)
            if sample >= 0:
                seconds[way] += spent
                tokens[way] += sum(pack.num_tokens for pack in packs)
    asked = num_proteins * len(questions)
    return {
        "ratio": seconds["one by one"] / seconds["packed"],
        "token_ratio": tokens["one by one"] / tokens["packed"],
        "packed_questions_per_second": asked / seconds["packed"],
        "one_by_one_questions_per_second": asked / seconds["one by one"],
        "packed_tokens_per_question": tokens["packed"] / asked,
        "one_by_one_tokens_per_question": tokens["one by one"] / asked,
    }


def timed(model, packs, rows, device) -> float:
    began = time.perf_counter()
    for pack in packs:
        model(pack.to(device), *rows).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=12)
    parser.add_argument("--width", type=int, default=96, help="width of the LLM [the demo's, 96]")
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # a rate per core: threads that wait for a busy core would measure the neighbours
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), args.proteins, args.width, args.layers, device)
    lines = [
        f"{args.proteins} proteins of PDB lengths, {world.QUESTIONS_PER_PROTEIN} questions each, LLM {args.width} "
        f"wide, {args.layers} layers, {device}",
        f"  one question per forward  {figures['one_by_one_questions_per_second']:9.1f} questions/s  "
        f"{figures['one_by_one_tokens_per_question']:6.0f} tokens each",
        f"  shared-prefix packs       {figures['packed_questions_per_second']:9.1f} questions/s  "
        f"{figures['packed_tokens_per_question']:6.0f} tokens each",
        f"  {figures['ratio']:.1f} x as fast; {figures['token_ratio']:.1f} x fewer tokens, which is the limit where "
        "time is in the matrix products",
    ]
    world.print_figures(lines, figures)


if __name__ == "__main__":
    main()
