"""The learning rate: values by hand, and the published code's curve from its formula written anew."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.config import StageConfig
from proteingpt.training.schedule import learning_rate


def stage(**changes) -> StageConfig:
    settings = dict(
        template="paper", epochs=1, samples_per_step=4, questions_per_group=1, max_answer_tokens=8, warmup_steps=100,
        warmup_lr=1e-6, init_lr=1e-4, min_lr=8e-5, betas=(0.9, 0.98), weight_decay=0.05,
    )  # fmt: skip
    return StageConfig(**{**settings, **changes})


PAPER_ALIGN = stage(warmup_steps=2048)


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 1e-6),
        (1024, 50.5e-6),  # half of the way from 1 to 100
        (512, 25.75e-6),
        (2048, 1e-4),
        (2048 + 25_000, 9e-5),  # half of the cosine is half of the way down
        (2048 + 50_000, 8e-5),
    ],
)
def test_the_papers_stage_1_by_hand(step, rate):
    assert learning_rate(step, 2048 + 50_000, PAPER_ALIGN) == pytest.approx(rate, rel=1e-12)


def test_the_cosine_by_hand():
    """A third of the way cos is 1/2, so a quarter of the height is gone; two thirds, three quarters."""
    flat = stage(warmup_steps=0, init_lr=1.0, min_lr=0.0)
    rates = [learning_rate(step, 300, flat) for step in (0, 100, 200, 300)]
    assert rates == pytest.approx([1.0, 0.75, 0.25, 0.0], abs=1e-15)


def test_without_warm_up_it_begins_at_init_lr():
    assert learning_rate(0, 10, stage(warmup_steps=0)) == 1e-4


def released(step: int, num_steps: int, s: StageConfig) -> float:
    """As in the published code: below W linear, from W on a cosine that counts from step 0."""
    if step < s.warmup_steps:
        return s.warmup_lr + (s.init_lr - s.warmup_lr) * step / s.warmup_steps
    return (s.init_lr - s.min_lr) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps)) + s.min_lr


@pytest.mark.parametrize("num_steps, init, floor", [(79_254, 1e-4, 8e-5), (925_000, 1e-5, 1e-6), (5_100, 1e-4, 8e-5)])
def test_the_released_curve_is_the_published_formula(num_steps, init, floor):
    s = stage(warmup_steps=5000, init_lr=init, min_lr=floor, cosine_from="start")
    for step in [0, 1, 2500, 4999, 5000, 5001, *range(5000, num_steps, num_steps // 50), num_steps - 1]:
        assert learning_rate(step, num_steps, s) == pytest.approx(released(step, num_steps, s), rel=1e-12)


def test_the_released_curve_steps_down_where_its_parts_join_and_ours_does_not():
    num_steps = 79_254  # 105,673 proteins, 3 epochs, 4 a step
    theirs, ours = (stage(warmup_steps=5000, cosine_from=origin) for origin in ("start", "warmup"))
    assert learning_rate(5000, num_steps, ours) == 1e-4
    # cos(pi * 5000 / 79254) = 0.98043: 1 % of the height of the cosine is missing.
    assert learning_rate(5000, num_steps, theirs) == pytest.approx(1e-4 - 2e-5 * 0.5 * (1 - 0.98043), rel=1e-6)


steps = st.integers(1, 10_000)
stages = st.builds(
    stage,
    warmup_steps=st.integers(0, 12_000),
    warmup_lr=st.floats(0, 1e-4),
    min_lr=st.floats(0, 1e-4),
    cosine_from=st.sampled_from(["warmup", "start"]),
)


@given(steps, stages, st.integers(0, 10_000))
def test_it_rises_up_to_the_end_of_warm_up_and_falls_from_then_on(num_steps, s, step):
    """So it never restarts either: the published code's warm-up began anew in each epoch below W steps."""
    here, there = learning_rate(step, num_steps, s), learning_rate(step + 1, num_steps, s)
    slack = 1e-18
    if step + 1 < s.warmup_steps:
        assert here <= there + slack
    elif step >= s.warmup_steps:
        assert there <= here + slack


@given(steps, stages, st.integers(0, 30_000))
def test_it_stays_between_its_floor_and_init_lr(num_steps, s, step):
    rate = learning_rate(step, num_steps, s)
    assert min(s.warmup_lr, s.min_lr) - 1e-18 <= rate <= s.init_lr + 1e-18
    if step >= num_steps > s.warmup_steps:
        assert rate == pytest.approx(s.min_lr)


@given(st.integers(2, 5000), st.integers(1, 4000))
def test_ours_is_continuous(num_steps, warmup_steps):
    """No step is larger than the steepest slope of its part: linear 1 / W, cosine pi / 2 over its length."""
    s = stage(warmup_steps=warmup_steps, warmup_lr=0.0, init_lr=1e-4, min_lr=0.0)
    height, length = 1e-4, max(1, num_steps - warmup_steps)
    for step in {max(0, warmup_steps - 2), warmup_steps - 1, warmup_steps, warmup_steps + 1}:
        jump = abs(learning_rate(step + 1, num_steps, s) - learning_rate(step, num_steps, s))
        bound = height / warmup_steps if step < warmup_steps else height * math.pi / 2 / length
        assert jump <= bound * (1 + 1e-9)


def test_a_run_shorter_than_its_warm_up_never_leaves_it():
    s = stage(warmup_steps=1000, warmup_lr=0.0, init_lr=1e-4)
    assert [learning_rate(step, 10, s) for step in range(10)] == pytest.approx([n * 1e-7 for n in range(10)])
