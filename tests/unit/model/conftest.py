"""A tiny LLM of every family."""

import pytest
from exported import WIDTH

from proteingpt.demo.llm import FAMILIES, write_tiny_llm


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    texts = ["What is the first residue of this protein? serine"]
    return {
        family: write_tiny_llm(tmp_path_factory.mktemp(family), texts, family=family, width=WIDTH, vocab_size=280)
        for family in FAMILIES
    }
