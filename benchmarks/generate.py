"""Questions answered per second: behind one shared prefix, against transformers' generate on one question at a time.

    python -m benchmarks.generate [--proteins 6] [--width 96] [--layers 2] [--new-tokens 8]

Both decode greedily with the same model from the same prefixes, whose embeddings are made beforehand, and must give the
same tokens. The two run in turns, protein by protein, so that a busy machine slows both.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import world
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardSet
from proteingpt.inference.generate import Asked, Decoding, decode, protein_prefix
from proteingpt.model import assemble, attention
from proteingpt.model.projector import Projector
from proteingpt.model.protein_gpt import ProteinGPT

STRUCTURE_WIDTH, SEQUENCE_WIDTH = 512, 2560  # of the published encoders; the rows are drawn


def measure(directory: Path, num_proteins: int, width: int, num_layers: int, new_tokens: int, device) -> dict:
    world.write_world(directory, num_proteins, width=width, num_layers=num_layers)
    shards = ShardSet(directory, "train")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    prompt = Prompt(assemble.load_tokenizer(str(directory / "llm")), TEMPLATES["released", "instruct"], 256)
    torch.manual_seed(0)
    llm = assemble.load_llm(str(directory / "llm"), dtype)
    projector = Projector(STRUCTURE_WIDTH, SEQUENCE_WIDTH, llm.config.hidden_size).to(dtype)
    model = ProteinGPT(projector, llm).eval().requires_grad_(False).to(device)
    seconds, num_equal, asked = {"shared": 0.0, "one by one": 0.0}, 0, 0
    for sample in range(-1, num_proteins):  # the first once more before the clock counts
        number = max(sample, 0)
        length = int(shards.num_residues[number]) + 2
        rows = [torch.randn(length, w, device=device, dtype=dtype) for w in (STRUCTURE_WIDTH, SEQUENCE_WIDTH)]
        prefix = protein_prefix(model, prompt, *rows)
        questions = [turn.question for turn in shards.read_text(number)[1]]
        ours, our_seconds = timed(lambda: shared(model.llm, prompt, prefix, questions, new_tokens), device)
        theirs, their_seconds = timed(lambda: one_by_one(model.llm, prompt, prefix, questions, new_tokens), device)
        if sample >= 0:
            seconds["shared"] += our_seconds
            seconds["one by one"] += their_seconds
            num_equal += sum(a == b[: len(a)] for a, b in zip(ours, theirs, strict=True))
            asked += len(questions)
    return {
        "ratio": seconds["one by one"] / seconds["shared"],
        "shared_questions_per_second": asked / seconds["shared"],
        "one_by_one_questions_per_second": asked / seconds["one by one"],
        "questions": asked,
        "equal_answers": num_equal,
    }


@torch.no_grad()
def shared(llm, prompt, prefix, questions, new_tokens) -> list[list[int]]:
    ids = [[] for _ in questions]
    for step in decode(llm, prompt, [Asked("", prefix, questions)], Decoding(new_tokens)):
        for row, token in step:
            ids[row].append(token)
    return ids


@torch.no_grad()
def one_by_one(llm, prompt, prefix, questions, new_tokens) -> list[list[int]]:
    llm.set_attn_implementation("sdpa")
    words, answers, end = llm.get_input_embeddings(), [], prompt.tokenizer.eos_token_id
    for ids in prompt.question_ids(questions):
        embeddings = torch.cat([prefix, words(torch.tensor(ids, device=prefix.device))])[None]
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=prefix.device)
        made = llm.generate(
            inputs_embeds=embeddings, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens,
            eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        answers.append(made[0].tolist())
    llm.set_attn_implementation(attention.NAME)
    return answers


def timed(work, device):
    began = time.perf_counter()
    value = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return value, time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=6)
    parser.add_argument("--width", type=int, default=96, help="width of the LLM [the demo's, 96]")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--new-tokens", type=int, default=8, help="decoded of each answer, which are about 2 words long"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # a rate per core: threads that wait for a busy core would measure the neighbours
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(Path(directory), args.proteins, args.width, args.layers, args.new_tokens, device)
    lines = [
        f"{args.proteins} proteins of PDB lengths, {world.QUESTIONS_PER_PROTEIN} questions each, {args.new_tokens} new "
        f"tokens, LLM {args.width} wide, {args.layers} layers, {device}",
        f"  transformers, one by one  {figures['one_by_one_questions_per_second']:9.1f} questions/s",
        f"  shared prefix             {figures['shared_questions_per_second']:9.1f} questions/s",
        f"  {figures['ratio']:.1f} x as fast; {figures['equal_answers']} of {figures['questions']} answers equal, "
        f"token "
        "for token",
    ]
    world.print_figures(lines, figures)


if __name__ == "__main__":
    main()
