"""What a model that sees no protein scores on the questions of an evaluation, so that every accuracy stands beside it.

Learned from all training answers, once, when it is first asked for: the report at the end needs it anyway.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from proteingpt.data.set_aside import readable_texts
from proteingpt.evaluation.baselines import BlindGuess
from proteingpt.evaluation.metrics import accuracy
from proteingpt.protein import Turn

log = logging.getLogger("proteingpt")


class Blind:
    """Of a run, on rank 0 alone. goes_on: called for each protein that is read, since reading a large set takes its
    time."""

    def __init__(self, shards, goes_on: Callable[[], None] = lambda: None):
        self.shards, self.goes_on = shards, goes_on

    @cached_property
    def guess(self) -> BlindGuess:
        return BlindGuess(self.turns())

    def turns(self) -> Iterator[Turn]:
        for _, turns in readable_texts(self.shards):
            self.goes_on()
            yield from turns

    def accuracy(self, asked: Sequence[tuple[str, str]]) -> float:
        """asked: (question, true answer), one at least. Of the very questions that the model was asked, 0 to 1."""
        return accuracy([self.guess(question) for question, _ in asked], [answer for _, answer in asked])
