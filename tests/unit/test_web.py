"""What decides on another try, and what a body must be; requests themselves are made in tests/faults."""

import email.message
import io
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteingpt.web import Failure, backoff, is_passing, read_chunks, retry_after_seconds


def test_a_wait_doubles_up_to_its_bound():
    assert [backoff(0.5, tries, 3.0) for tries in (1, 2, 3, 4, 9)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@given(st.integers(1, 30), st.integers(0, 1 << 32))
def test_a_seeded_wait_is_half_to_all_of_it_and_the_same_each_time(tries, seed):
    whole = backoff(1.0, tries, 60.0)
    assert whole / 2 <= backoff(1.0, tries, 60.0, (seed, 7)) <= whole
    assert backoff(1.0, tries, 60.0, (seed, 7)) == backoff(1.0, tries, 60.0, (seed, 7))


@pytest.mark.parametrize(
    "header, seconds",
    [
        (None, 0),
        ("", 0),
        ("500", 500),
        ("-3", 0),
        ("nan", 0),
        ("soon", 0),
        ("Wed, 01 May 2024 12:00:30 GMT", 30),
        ("Wed, 01 May 2024 12:00:30 -0000", 30),
        ("Wed, 01 May 2024 11:00:00 GMT", 0),
    ],
)
def test_a_server_asks_for_seconds_or_names_a_date_or_says_nothing_that_can_be_read(header, seconds):
    assert retry_after_seconds(header, datetime(2024, 5, 1, 12, 0, 0, tzinfo=UTC)) == seconds


def test_only_faults_that_pass_are_worth_another_try():
    statuses = (200, 301, 400, 401, 404, 408, 410, 413, 425, 429, 500, 503, 504)
    assert [status for status in statuses if is_passing(status)] == [408, 425, 429, 500, 503, 504]


class Response(io.BytesIO):
    def __init__(self, body: bytes, announced: str | None):
        super().__init__(body)
        self.headers = email.message.Message()
        if announced is not None:
            self.headers["Content-Length"] = announced


def read(body: bytes, announced: str | None, max_bytes: int = 100, seconds: float = 60) -> bytes:
    return b"".join(read_chunks(Response(body, announced), max_bytes, time.monotonic() + seconds))


def test_a_body_comes_whole_or_not_at_all():
    assert read(b"abc", "3") == read(b"abc", None) == b"abc"
    with pytest.raises(Failure, match="truncated: 3 of 4 bytes") as error:
        read(b"abc", "4")
    assert error.value.passing and error.value.sent


@pytest.mark.parametrize(
    "arguments, reason",
    [((b"x" * 101, None), "more than the 100"), ((b"", "101"), "more than the 100"), ((b"", "0", 9, -1), "too slow")],
)
def test_a_body_too_large_or_too_late_is_not_worth_another_try(arguments, reason):
    with pytest.raises(Failure, match=reason) as error:
        read(*arguments)
    assert not error.value.passing
