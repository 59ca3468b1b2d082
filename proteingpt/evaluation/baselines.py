"""What a model that never sees the protein scores: for each question, the commonest answer in training.

Every accuracy of ours stands beside this one. Questions are told apart by their exact text.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from proteingpt.evaluation.metrics import accuracy, normalise
from proteingpt.protein import Turn


def blind_answers(turns: Iterable[Turn]) -> dict[str, str]:
    """Question -> its commonest answer among the training turns.

    Answers are counted in their normalised form, since they are scored so; of equally common ones the first in sorted
    order is taken, spelled as its first spelling in sorted order. So the order of the turns does not matter.
    """
    return {question: _commonest(spellings) for question, spellings in _count(turns).items()}


def blind_accuracy(training_turns: Iterable[Turn], test_turns: Iterable[Turn]) -> float:
    """Accuracy of `blind_answers` on the test turns, 0 to 1.

    A question that training did not hold gets the commonest answer over all training questions: the best guess left to
    a blind model, so the baseline is not made to look worse than it is.
    Raises ValueError where there are no training turns or no test turns.
    """
    test_turns = list(test_turns)
    guess = BlindGuess(training_turns)
    return accuracy([guess(turn.question) for turn in test_turns], [turn.answer for turn in test_turns])


class BlindGuess:
    """question -> `blind_answers`, or the commonest answer over all questions where training did not hold it.

    Raises ValueError where there are no training turns.
    """

    def __init__(self, training_turns: Iterable[Turn]):
        given = _count(training_turns)
        if not given:
            raise ValueError("no training turns: the blind baseline needs at least one answer to learn from")
        self.guesses = {question: _commonest(spellings) for question, spellings in given.items()}
        self.fallback = _commonest(sum(given.values(), Counter()))

    def __call__(self, question: str) -> str:
        return self.guesses.get(question, self.fallback)


def _count(turns: Iterable[Turn]) -> dict[str, Counter]:
    """Question -> how often each spelling of an answer was given: of millions of turns these are few."""
    given = defaultdict(Counter)
    for turn in turns:
        given[turn.question][turn.answer] += 1
    return given


def _commonest(spellings: Counter) -> str:
    forms = {text: normalise(text) for text in spellings}
    counts = Counter()
    for text, number in spellings.items():
        counts[forms[text]] += number
    winner = min(counts, key=lambda form: (-counts[form], form))
    return min(text for text, form in forms.items() if form == winner)
