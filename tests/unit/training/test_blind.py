"""The blind baseline of a run, learned once."""

import pytest

from proteingpt.data.shards import ShardError
from proteingpt.protein import Turn
from proteingpt.training.blind import Blind


class Shards:
    """Three proteins, of which one cannot be read."""

    def __init__(self):
        self.num_reads = 0

    def __len__(self):
        return 3

    def read_text(self, sample: int):
        self.num_reads += 1
        if sample == 1:
            raise ShardError("torn")
        return "", (Turn("Helix?", "yes"), Turn("Helix?", "Yes") if sample else Turn("Method?", "NMR"))


def test_it_answers_with_the_commonest_training_answer_and_reads_them_once():
    shards, beats = Shards(), []
    blind = Blind(shards, lambda: beats.append(1))
    assert shards.num_reads == 0
    asked = [("Helix?", "yes."), ("Helix?", "no"), ("Method?", "NMR"), ("Unseen?", "yes")]
    assert blind.accuracy(asked) == pytest.approx(3 / 4)
    assert blind.accuracy([("Helix?", "no")]) == 0.0
    assert shards.num_reads == 3 and len(beats) == 2
