"""95 % intervals by bootstrap over proteins: whole proteins are weighted, since the questions about one are not
independent.

The Bayesian bootstrap (Rubin 1981, Ann. Stat. 9:130): a draw weights the n proteins by n times Dirichlet(1, ..., 1),
and the interval holds the middle 95 % of 1,000 seeded draws. For means it is as wide as resampling makes it; and no
protein ever has weight 0, so that a draw lacks no answer that few proteins have: resamples do, and their balanced
accuracies lie above the estimate. Row 0 of the weights is all ones, so estimate and draws come from the same code, and
differences between two contestants are paired. """

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 1000
ROWS_AT_ONCE = 100  # bounds the memory of the weights
LOW, HIGH = 2.5, 97.5


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval. NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> "Interval":
        """samples: (1 + draws,), the estimate first."""
        drawn = samples[1:][~np.isnan(samples[1:])]
        low, high = np.percentile(drawn, [LOW, HIGH]) if len(drawn) else (np.nan, np.nan)
        return cls(float(samples[0]), float(low), float(high))


def draw_weights(num_proteins: int, seed: int, num_draws: int = NUM_DRAWS) -> Iterator[np.ndarray]:
    """float64 (rows, num_proteins), 1 + num_draws rows in all: ones, then what each protein counts, n in all."""
    rng = np.random.default_rng((seed, 95))
    yield np.ones((1, num_proteins))
    for first in range(0, num_draws, ROWS_AT_ONCE):
        drawn = rng.standard_exponential((min(ROWS_AT_ONCE, num_draws - first), num_proteins))
        yield drawn * (num_proteins / drawn.sum(axis=1, keepdims=True))  # which is Dirichlet's


def sample(statistics: dict, num_proteins: int, seed: int, num_draws: int = NUM_DRAWS) -> dict:
    """Every statistic under the same weights: {name: (1 + num_draws,)}."""
    drawn = {name: [] for name in statistics}
    for weights in draw_weights(num_proteins, seed, num_draws):
        for name, statistic in statistics.items():
            drawn[name].append(statistic(weights))
    return {name: np.concatenate(values) for name, values in drawn.items()}
