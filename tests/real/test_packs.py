"""Packs of real proteins with their real questions are the sums of those questions, each asked alone."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from one_question import (
    LLMS, SCALE, SEQUENCE_WIDTH, TOLERANCE, WAYS, assert_close, by, load, one_at_a_time, packed, together, write_llm,
)  # fmt: skip

from proteingpt.data.collate import Group
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.model.assemble import load_tokenizer
from proteingpt.protein import Protein

REAL = Path(__file__).parents[3] / "shared" / "data" / "proteinchat"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"the published data in {REAL} are absent")

IDS = ("1le0", "6b5n")  # short ones, that asking each of 57 questions alone stays quick


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict]]:
    """{id: its published questions, [{Q, A}]}."""
    published = json.loads((REAL / "qa.json").read_text())
    return {entry: published[entry] for entry in IDS}


@pytest.fixture(scope="module")
def models(tmp_path_factory, questions):
    """models(name, dtype): as in test_packs.py, with ESM-IF1's width; and the tokenizer of these questions."""
    texts = sorted(str(text) for turns in questions.values() for turn in turns for text in turn.values())

    @functools.cache
    def make(name: str, dtype: torch.dtype):
        directory = write_llm(tmp_path_factory.mktemp("llm"), name, texts, SCALE[dtype])
        return (*load(directory, dtype, structure_width=512), load_tokenizer(str(directory)))

    return make


def real_groups(tokenizer, questions) -> list[Group]:
    """Every published question of the proteins, in the released wording; the backbone is not read here."""
    prompt, groups = Prompt(tokenizer, TEMPLATES["released", "instruct"], 256), []
    for entry, turns in questions.items():
        length = len(embedding(entry)) - 2
        protein = Protein(entry, "A", "G" * length, np.zeros((length, 3, 3), np.float32))
        asked = prompt.question_ids([turn["Q"] for turn in turns])
        answers = prompt.answer_ids([str(turn["A"]) for turn in turns])
        groups.append(Group(entry, protein, prompt.prefix_ids, list(zip(asked, answers, strict=True))))
    return groups


def embedding(entry: str) -> torch.Tensor:
    """(L + 2, 512): real rows of the real ESM-IF1."""
    return torch.load(REAL / "pt" / f"{entry}.pt", map_location="cpu", weights_only=True).detach()[:, 0]


def real_rows(groups, dtype):
    generator = torch.Generator().manual_seed(0)
    structure = [embedding(group.key).to(dtype) for group in groups]
    return structure, [torch.randn(len(rows), SEQUENCE_WIDTH, generator=generator).to(dtype) for rows in structure]


@pytest.mark.parametrize(
    "name, dtype, way",
    [
        *((name, torch.float64, "flex") for name in LLMS if "window" not in name),  # they are longer than the window
        *(("llama", torch.float64, way) for way in WAYS if way != "flex"),
        *(("qwen2", dtype, way) for dtype in (torch.float32, torch.bfloat16) for way in ("sdpa", "flex")),
    ],
)
def test_real_packs_are_the_sums_of_their_questions(models, questions, name, dtype, way):
    model, alone, tokenizer = models(name, dtype)
    groups = real_groups(tokenizer, questions)
    assert [len(group.branches) for group in groups] == [len(turns) for turns in questions.values()]
    rows = real_rows(groups, dtype)
    with by(model, way):
        found = packed(model, groups, rows)
    wanted = one_at_a_time(model, alone, groups, rows)
    if dtype == torch.bfloat16:
        # Loss and projector: the LLM's own gradients, which a frozen one has not, are rounded by a little more (2.5 %).
        found, wanted = ({part: together(side)[part] for part in ("loss", "projector")} for side in (found, wanted))
    assert_close(found, wanted, TOLERANCE[dtype])
