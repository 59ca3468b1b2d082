"""The published ProteinChat sample reads whole, and its counts are those its README states."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from proteingpt.data.published import embedding_files, published_samples, read_embeddings, read_texts

REAL = Path(__file__).parents[3] / "shared" / "data" / "proteinchat"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"the published data in {REAL} are absent")


@pytest.fixture(scope="module")
def texts():
    return read_texts(REAL / "qa.json", REAL / "abstract.json")


@pytest.fixture(scope="module")
def lengths():
    """{id: number of residues} of every embedding, all of which are read."""
    found = {}
    for entry, rows in read_embeddings(REAL / "pt"):
        assert rows.dtype == np.float32 and rows.shape[1] == 512
        assert 0.01 < rows.std() < 100, entry
        found[entry] = len(rows) - 2
    return found


def test_the_counts_are_those_of_the_readme(texts, lengths):
    with_questions = {entry for entry, text in texts.items() if text.turns}
    with_abstract = {entry for entry, text in texts.items() if text.description}
    assert len(with_questions) == 508
    assert len(with_abstract) == 383
    assert len(lengths) == len(embedding_files(REAL / "pt")) == 184
    assert len(lengths.keys() & with_questions) == 167


def test_every_question_is_kept_with_its_answer_as_text(texts):
    """Against the file as plain JSON: numbers as JSON writes them, text without blanks around it."""
    published = json.loads((REAL / "qa.json").read_text())
    for entry, pairs in published.items():
        wanted = [(p["Q"], p["A"] if isinstance(p["A"], str) else json.dumps(p["A"])) for p in pairs]
        assert [(turn.question, turn.answer) for turn in texts[entry].turns] == wanted
    for item in json.loads((REAL / "abstract.json").read_text()):
        assert letters(texts[item["pdb_id"]].description) == letters(item["caption"])


def letters(text: str) -> str:
    """Without blanks and the tags that this file has; ^ marks what was a superscript."""
    return re.sub(r"</?(sup|sub|i|b|u)>|\s|\^", "", text)


def test_every_protein_with_an_embedding_becomes_a_sample(texts, lengths):
    samples = {sample.protein.id: sample for sample in published_samples(texts, read_embeddings(REAL / "pt"))}
    assert {entry: len(sample.protein) for entry, sample in samples.items()} == lengths
    assert sum(bool(sample.turns) for sample in samples.values()) == 167
    assert all(sample.description for sample in samples.values())
