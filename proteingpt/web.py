"""One HTTP request with the standard library: how it is sent, how its body comes, and when to try again.

The clients of RCSB and of language models share this and no more: their loops differ in what they count (time in all,
money), and in what an error says. An answer with an error's status is an answer here; what it means is for the caller.
"""

import email.utils
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import numpy as np

CHUNK_BYTES = 1 << 16
_PASSING_STATUSES = (408, 425, 429)  # and everything from 500 on


class Failure(Exception):
    """A request that brought no whole answer, or one that its caller will not have.

    passing: whether another try may do better. sent: False where there was no connection. kind: `timeout`, or a word
    of the caller's. status, retry_after (seconds the server asked to wait): of an answer.
    """

    def __init__(
        self,
        reason: str,
        passing: bool = True,
        status: int | None = None,
        kind: str = "",
        retry_after: float = 0.0,
        sent: bool = True,
    ):
        super().__init__(reason)
        self.reason, self.passing, self.status, self.kind = reason, passing, status, kind
        self.retry_after, self.sent = retry_after, sent


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


_OPENER = urllib.request.build_opener()
_OPENER_HERE = urllib.request.build_opener(_NoRedirect)


def send(url: str, body: bytes | None, headers: Mapping[str, str], timeout: float, follow_redirects: bool = True):
    """The response of any status, its body still to be read: POST where there is a body, else GET. Raises Failure.

    timeout: seconds without a byte. follow_redirects: False where a header is meant for this host alone.
    """
    opener = _OPENER if follow_redirects else _OPENER_HERE
    try:
        return opener.open(urllib.request.Request(url, body, dict(headers)), timeout=timeout)
    except urllib.error.HTTPError as error:
        return error
    except (OSError, http.client.HTTPException) as error:
        raise _failure(error) from error


def read_chunks(response, max_bytes: int, deadline: float) -> Iterator[bytes]:
    """The body, piece by piece. Raises Failure where it is too large, lost, not there at `deadline` (of
    time.monotonic), or shorter than announced, which http.client passes over in silence."""
    header = response.headers.get("Content-Length", "")
    announced = int(header) if header.isdecimal() else 0
    received = 0
    while True:
        if max(received, announced) > max_bytes:
            raise Failure(f"more than the {max_bytes} bytes allowed", passing=False)
        if time.monotonic() > deadline:
            raise Failure("too slow: the time for this file is used up", passing=False)
        try:
            # One read of the socket each, so that a trickle cannot hide from the deadline.
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _failure(error) from error
        if not chunk:
            break
        received += len(chunk)
        yield chunk
    if received < announced:
        raise Failure(f"truncated: {received} of {announced} bytes came")


def _failure(error: Exception) -> Failure:
    # urllib wraps what happens before the request is out, and nothing else.
    unsent = isinstance(error, urllib.error.URLError)
    cause = error.reason if unsent else error
    if isinstance(cause, TimeoutError):
        return Failure("timeout", kind="timeout", sent=not unsent)
    reason = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    # A certificate does not become valid by asking again.
    return Failure(reason, passing=not isinstance(cause, ssl.SSLCertVerificationError), sent=not unsent)


def is_passing(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in _PASSING_STATUSES or status >= 500


def backoff(first_seconds: float, tries: int, max_seconds: float, seed: tuple[int, ...] | None = None) -> float:
    """Seconds to wait after so many tries: twice as long each time, never more than max_seconds.

    With a seed it is times 0.5 to 1, drawn by seed and tries, so that many clients do not come back at once.
    """
    jitter = 1.0 if seed is None else np.random.default_rng((*seed, tries)).uniform(0.5, 1.0)
    return min(first_seconds * 2.0 ** (tries - 1), max_seconds) * jitter


def retry_after_seconds(header: str | None, now: datetime) -> float:
    """Of a Retry-After header, seconds or a date; 0 where there is none that can be read. now: with a time zone."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0
