"""The rate of requests, by a clock that passes by sleeping alone. Requests that fail:
tests/faults/test_rcsb_server.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.data.fetching import RateLimit


class Clock:
    """Time passes only by sleeping."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@given(st.lists(st.floats(0, 0.7), min_size=12, max_size=30))
def test_no_second_sees_more_starts_than_allowed(gaps):
    clock, starts = Clock(), []
    limit = RateLimit(4, clock, clock.sleep)
    for gap in gaps:
        clock.now += gap
        limit.wait()
        starts.append(clock.now)
    # Four intervals between the first and the fifth of any five.
    assert all(b - a >= 1 - 1e-9 for a, b in zip(starts, starts[4:]))


def test_after_a_hold_nobody_starts_before_it_ends():
    clock = Clock()
    limit = RateLimit(10, clock, clock.sleep)
    limit.wait()
    limit.hold(30)
    limit.wait()
    assert clock.now == pytest.approx(130)
    limit.wait()
    assert clock.now == pytest.approx(130.1)
