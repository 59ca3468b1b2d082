"""What the training benchmarks share: proteins of PDB lengths with 29 questions each, in real shards, and small
models."""

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.encoders import pdb_lengths, random_protein
from proteingpt.data.shards import write_shards
from proteingpt.demo.encoders import write_tiny_esm2, write_tiny_esm_if1
from proteingpt.demo.llm import write_tiny_llm
from proteingpt.protein import Sample, Turn

QUESTIONS_PER_PROTEIN = 29  # of the 30 published templates 28 to 30 are present for a protein

STAGE = dict(
    template="released", epochs=1, max_answer_tokens=256, warmup_steps=0, warmup_lr=0.0, init_lr=1e-4, min_lr=0.0,
    betas=(0.9, 0.98), weight_decay=0.05,
)  # fmt: skip


def samples(num: int, seed: int, longest: int = 1500) -> list[Sample]:
    """Questions and answers have the length of the published ones, about 14 and 2 words."""
    made = []
    for i, length in enumerate(pdb_lengths(num, seed)):
        protein = replace(random_protein(min(length, longest), seed=seed + i), id=f"random{i:05d}")
        turns = tuple(
            Turn(
                f"How many atoms of kind {n} stand in the coordinates that were deposited for this protein?", f"{i} {n}"
            )
            for n in range(QUESTIONS_PER_PROTEIN)
        )
        made.append(Sample(protein, f"A protein of {length} residues.", turns))
    return made


def write_world(
    directory: Path, num_proteins: int, *, width: int, num_layers: int, seed: int = 0, longest: int = 1500
) -> Path:
    """Shards, tiny encoders and a random LLM in `directory`, as a user's own lie there."""
    made = samples(num_proteins, seed, longest)
    texts = sorted({turn.question + turn.answer for sample in made for turn in sample.turns})
    write_tiny_llm(directory / "llm", texts, width=width, num_layers=num_layers, seed=seed)
    write_tiny_esm2(directory / "esm2_demo.pt", seed=seed)
    write_tiny_esm_if1(directory / "esm_if1_demo.pt", seed=seed)
    write_shards(directory, {"train": made, "test": []}, samples_per_shard=100, options={})
    return directory


def print_figures(lines: list[str], figures: dict):
    """For people, and as one JSON line last."""
    print("\n".join(lines))
    print(json.dumps(figures), flush=True)
