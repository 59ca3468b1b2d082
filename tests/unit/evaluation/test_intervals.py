"""Intervals: paired, seeded, over whole proteins, and as wide as theory says."""

import numpy as np
import pytest

from proteingpt.evaluation.closed import mean_of
from proteingpt.evaluation.intervals import Interval, draw_weights, sample


def test_the_first_weights_are_ones_and_each_draw_is_of_as_many_proteins():
    weights = np.concatenate(list(draw_weights(7, seed=1, num_draws=250)))
    assert weights.shape == (251, 7) and (weights[0] == 1).all()
    np.testing.assert_allclose(weights.sum(axis=1), 7)
    assert (weights > 0).all()
    assert len(np.unique(weights, axis=0)) > 100


def test_the_seed_decides():
    first, again, other = (np.concatenate(list(draw_weights(9, seed, 50))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_an_interval_of_a_mean_is_that_of_theory():
    """A share of 0.3 of 400 proteins: standard error sqrt(0.3 * 0.7 / 400) = 0.0229, so 0.3 -+ 0.045."""
    values = np.repeat([1.0, 0.0], [120, 280])
    drawn = sample({"share": mean_of(np.arange(400), values)}, 400, seed=3)
    interval = Interval.of(drawn["share"])
    assert interval.value == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - 1.96 * 0.0229, abs=0.006)
    assert interval.high == pytest.approx(0.3 + 1.96 * 0.0229, abs=0.006)


def test_questions_about_one_protein_are_not_independent():
    """40 proteins whose 25 questions are right or wrong together: the interval is that of 40, not of 1,000."""
    places, values = np.repeat(np.arange(40), 25), np.repeat(np.arange(40) % 2, 25).astype(float)
    interval = Interval.of(sample({"x": mean_of(places, values)}, 40, seed=3)["x"])
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 40), rel=0.15)


def test_differences_are_paired():
    """One contestant is always 0.1 above the other: the difference is certain, though neither score is."""
    rng = np.random.default_rng(0)
    values = rng.random(50)
    drawn = sample({"a": mean_of(np.arange(50), values), "b": mean_of(np.arange(50), values + 0.1)}, 50, seed=5)
    lift = Interval.of(drawn["b"] - drawn["a"])
    assert (lift.value, lift.low, lift.high) == pytest.approx((0.1, 0.1, 0.1))
    alone = Interval.of(drawn["a"])
    assert alone.high - alone.low > 0.1


def test_without_anything_known_there_is_no_interval():
    interval = Interval.of(np.full(11, np.nan))
    assert all(np.isnan([interval.value, interval.low, interval.high]))
