"""The blind baseline on published ProteinChat questions, beside the figures measured for it on 1,000 proteins."""

import json
from pathlib import Path

import numpy as np
import pytest

from proteingpt.evaluation.baselines import blind_accuracy
from proteingpt.protein import Turn

QUESTIONS = Path(__file__).parents[3] / "shared" / "data" / "proteinchat" / "qa.json"
pytestmark = pytest.mark.skipif(not QUESTIONS.exists(), reason=f"the real questions are absent: {QUESTIONS}")

CATEGORICAL = {
    "What is the polymer entity composition for this protein?",
    "What is the nucleic acid polymer entity type for this protein?",
    "What experimental method(s) were used to determine the structure of this protein?",
    "What is the polymer entity type for this protein?",
    "Is this protein determined by experimental or computational methods?",
}


def is_yes_no(turn):
    return turn.question.startswith("Does this protein")


def is_closed(turn):
    """Yes/no and categorical templates: answers from a short list, no counts and no free text."""
    return is_yes_no(turn) or turn.question in CATEGORICAL


def mean_blind_accuracy(splits, kind):
    scores = [blind_accuracy(filter(kind, training), filter(kind, held_out)) for training, held_out in splits]
    return np.mean(scores)


@pytest.fixture(scope="module")
def splits():
    """Five splits by protein, 400 to learn the answers from and 108 to score."""
    published = json.loads(QUESTIONS.read_text())
    turns = {key: [Turn(qa["Q"], str(qa["A"])) for qa in published[key]] for key in sorted(published)}
    keys = np.array(sorted(turns))
    orders = [np.random.default_rng((2024, split)).permutation(len(keys)) for split in range(5)]

    def gather(chosen):
        return [turn for key in keys[chosen] for turn in turns[key]]

    return [(gather(order[:400]), gather(order[400:])) for order in orders]


def test_all_templates_score_61_percent_blind(splits):
    """61.3 % is the figure on 1,000 proteins; 3 points of room for half as many, split otherwise."""
    assert mean_blind_accuracy(splits, lambda turn: True) == pytest.approx(0.613, abs=0.03)


def test_closed_questions_score_86_percent_blind(splits):
    """86.4 % is the figure for yes/no and categorical questions together; 2 points of room."""
    assert mean_blind_accuracy(splits, is_closed) == pytest.approx(0.864, abs=0.02)


def test_yes_no_questions_score_85_percent_blind(splits):
    """84.9 % is the figure for yes/no questions alone; 2 points of room."""
    assert mean_blind_accuracy(splits, is_yes_no) == pytest.approx(0.849, abs=0.02)
