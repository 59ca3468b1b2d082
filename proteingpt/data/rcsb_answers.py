"""What RCSB's servers answer, checked: an answer that is not whole, or not of its form, is a failure, never a result.

Bodies are looked at while they pass by, chunk by chunk, so that no file has to fit in memory.
"""

import contextlib
import http.client
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from proteingpt.web import Failure, is_passing, retry_after_seconds

# Of a message, not of a status: asking for less may help. "Too many requests" is not of these.
_SAYS_TOO_LARGE = re.compile(r"complex|too (large|long|big|deep|many (?!requests))|maximum|timed? ?out", re.IGNORECASE)


def refusal(response) -> Failure:
    """What an answer with an error's status means."""
    said, status = "", response.status
    with contextlib.suppress(OSError, http.client.HTTPException):
        said = " ".join(response.read(2000).decode("utf-8", "replace").split())
    kind = {408: "timeout", 413: "too large", 414: "too large", 504: "timeout"}.get(status, "")
    if status == 400 and _SAYS_TOO_LARGE.search(said):
        kind = "too large"
    excerpt = f": {said[:200]}" if status == 400 and said else ""
    wanted_pause = retry_after_seconds(response.headers.get("Retry-After"), datetime.now(UTC))
    return Failure(f"HTTP {status} {response.reason}{excerpt}", is_passing(status), status, kind, wanted_pause)


def receive_json(chunks: Iterable[bytes]):
    try:
        return json.loads(b"".join(chunks))
    except (ValueError, RecursionError) as error:
        raise Failure(f"the answer is not whole JSON: {error}") from error


def receive_entries(chunks: Iterable[bytes]) -> list[dict]:
    """`data.entries` of a GraphQL answer. One with errors is refused whole: an error nulls fields, too."""
    answer = receive_json(chunks)
    if not isinstance(answer, dict):
        raise Failure("the answer is not of GraphQL's form")
    if answer.get("errors"):
        said = json.dumps(answer["errors"])
        kind = "too large" if _SAYS_TOO_LARGE.search(said) else "errors"
        raise Failure(f"GraphQL errors: {said[:300]}", kind=kind)
    entries = (answer.get("data") or {}).get("entries")
    if not isinstance(entries, list):
        raise Failure("the answer has no data.entries")
    return [entry for entry in entries if isinstance(entry, dict)]


def receive_ids(chunks: Iterable[bytes]) -> list[str]:
    """Identifiers of a search, in either verbosity; as many as it says it found, or it is refused."""
    answer = receive_json(chunks)
    try:
        ids = [hit if isinstance(hit, str) else hit["identifier"] for hit in answer["result_set"]]
        total = answer["total_count"]
    except (KeyError, TypeError) as error:
        raise Failure("the answer is not that of a search") from error
    if len(ids) != total:
        raise Failure(f"the search found {total} entries and gave {len(ids)}")
    return ids


def whole_gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Passes the chunks on, unpacking as it goes: a gzip that is damaged or ends early is a failure."""
    unpacker = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        try:
            packed = chunk
            while packed:
                if unpacker.eof:
                    unpacker = zlib.decompressobj(wbits=31)
                unpacker.decompress(packed)
                packed = unpacker.unused_data
        except zlib.error as error:
            raise Failure(f"not a whole gzip file: {error}") from error
        yield chunk
    if not unpacker.eof:
        raise Failure("the gzip file ends early")


def text_like(beginning: bytes, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Passes the chunks on if the first matches the pattern and the last ends a line: not a page of excuses."""
    first = last = b""
    for chunk in chunks:
        first, last = first or chunk, chunk
        yield chunk
    if not re.match(beginning, first) or not last.endswith(b"\n"):
        raise Failure(f"not the file wanted, or its end is missing: it begins with {first[:40]!r}")


def search_for_entries(released_until: str | None) -> dict:
    """A request of RCSB's Search API for the ids of all experimental entries."""
    if released_until is None:
        condition = {"attribute": "rcsb_entry_container_identifiers.entry_id", "operator": "exists"}
    else:
        condition = {
            "attribute": "rcsb_accession_info.initial_release_date",
            "operator": "less_or_equal",
            "value": f"{released_until}T23:59:59Z",
        }
    return {
        "query": {"type": "terminal", "service": "text", "parameters": condition},
        "return_type": "entry",
        "request_options": {
            "return_all_hits": True,
            "results_verbosity": "compact",
            "results_content_type": ["experimental"],
        },
    }
