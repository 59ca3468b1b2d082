"""Any OpenAI-compatible endpoint: where it is, the key, a request whose answer has a schema, and what it may cost.

Money is reserved before a request is sent and corrected by the usage the server reports. The key comes from the
environment alone, and stands in no message and no answer. Given up: an exact token count before sending (that takes
each model's own tokenizer), and the provider's batch interfaces, which are not part of the protocol.
"""

import contextlib
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

from proteingpt.web import Failure, backoff, is_passing, read_chunks, retry_after_seconds, send

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"

# English abstracts run at 4 to 5 bytes a token, so this errs towards more tokens.
BYTES_PER_TOKEN = 3
MAX_REPLY_BYTES = 4 << 20
MAX_WAIT_SECONDS = 120.0
FATAL_STATUSES = (401, 402, 403, 404, 405)
# A shorter key is a placeholder such as EMPTY, and may well be a word of an answer.
MIN_SECRET_LENGTH = 12


class EndpointError(ValueError):
    """A setting that cannot be used, or an endpoint that refuses every request or cannot be reached: what to change."""


class InvalidAnswer(ValueError):
    """An answer of the model that is not what was asked for."""


class RequestFailed(Exception):
    """A request that was given up; another protein's may succeed."""


class RequestRefused(Exception):
    """The server will not have this request as it is (400, 422)."""


class OutOfBudget(Exception):
    """The next request might exceed the budget."""


class Stopped(Exception):
    """The run is ending."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask and how patiently. url: the base, as in https://host/v1, or the whole .../chat/completions."""

    url: str
    key: str | None = field(default=None, repr=False)
    key_variable: str = DEFAULT_KEY_VARIABLE
    timeout_seconds: float = 120.0
    num_retries: int = 5
    backoff_seconds: float = 1.0

    def __post_init__(self):
        check_url(self.url)
        check_key(self.key, self.key_variable)
        if not (self.timeout_seconds > 0 and self.num_retries >= 0 and self.backoff_seconds >= 0):
            raise EndpointError(
                f"--timeout-seconds {self.timeout_seconds}, --retries {self.num_retries}, --backoff-seconds "
                f"{self.backoff_seconds}: wanted a timeout above zero and the others not below it"
            )

    @property
    def address(self) -> str:
        url = self.url.rstrip("/")
        return url if url.endswith("/chat/completions") else f"{url}/chat/completions"

    def redact(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self._is_secret else text

    def holds_key(self, text: str) -> bool:
        return self._is_secret and self.key in text

    @property
    def _is_secret(self) -> bool:
        return self.key is not None and len(self.key) >= MIN_SECRET_LENGTH


@dataclass(frozen=True)
class Prices:
    """US dollars per 1,000 tokens, exact."""

    usd_per_1k_input: Decimal
    usd_per_1k_output: Decimal

    def cost(self, tokens: "Tokens") -> Decimal:
        return (self.usd_per_1k_input * tokens.input + self.usd_per_1k_output * tokens.output) / 1000


@dataclass(frozen=True)
class Tokens:
    """Tokens sent and received."""

    input: int = 0
    output: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.input + other.input, self.output + other.output)


@dataclass(frozen=True)
class Form:
    """What the requests of a client have in common. schema: of the JSON that is wanted; schema_name: of it."""

    model: str
    system_message: str
    schema_name: str
    schema: Mapping
    max_output_tokens: int


# --- the settings ---------------------------------------------------------------------------------------------------


def check_url(url: str) -> None:
    """Raises EndpointError for what is no plain http(s) address. Credentials belong in the environment."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, usable = None, False
    if parts is not None and (parts.username or parts.password or parts.query or parts.fragment):
        # Not shown: what stands there may be a key.
        raise EndpointError(
            "--qa-endpoint holds a user name, a query or a fragment: wanted an address as in https://host/v1, "
            f"with the key in the environment variable {DEFAULT_KEY_VARIABLE}"
        )
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise EndpointError(f"--qa-endpoint is {url!r}, wanted an http or https address as in https://host/v1")


def check_key(key: str | None, variable: str) -> None:
    """Raises EndpointError, which does not show the key, for one that no header can carry."""
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise EndpointError(
            f"the key in the environment variable {variable} is empty or holds a blank, a line end or a character "
            "beyond ASCII: set it again, without quotes or line ends"
        )


def read_key(variable: str | None, environ: Mapping[str, str]) -> str | None:
    """The key in the environment. None where no variable is named and OPENAI_API_KEY is not set: local servers need no
    key. Raises EndpointError where a named variable is not set."""
    if variable is not None and variable not in environ:
        raise EndpointError(f"the environment variable {variable} is not set: export it, or name another")
    return environ.get(variable or DEFAULT_KEY_VARIABLE) or None


# --- money ----------------------------------------------------------------------------------------------------------


def estimate_tokens(body: bytes, max_output_tokens: int) -> Tokens:
    """At most what a request takes, near enough: a token for each 3 bytes of its JSON, and the whole of its answer."""
    return Tokens(-(-len(body) // BYTES_PER_TOKEN), max_output_tokens)


def make_prices(usd_per_1k_input, usd_per_1k_output) -> Prices | None:
    """From numbers or text; None where neither is given. Raises EndpointError for one alone, or no price."""
    if usd_per_1k_input is None and usd_per_1k_output is None:
        return None
    if usd_per_1k_input is None or usd_per_1k_output is None:
        raise EndpointError("give both --usd-per-1k-input and --usd-per-1k-output, or neither")
    return Prices(
        make_usd(usd_per_1k_input, "--usd-per-1k-input"), make_usd(usd_per_1k_output, "--usd-per-1k-output")
    )


def make_usd(value, name: str) -> Decimal:
    """An exact amount, zero or more."""
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0:
        raise EndpointError(f"{name} is {value!r}, wanted a number of US dollars, zero or more")
    return amount


class Ledger:
    """What may still be spent. Threads reserve before they send, and settle when they know what it took."""

    def __init__(self, prices: Prices | None, max_usd: Decimal | None, spent_usd: Decimal = Decimal(0)):
        assert max_usd is None or prices is not None, "a bound needs prices"
        self.prices, self.max_usd, self.spent_usd = prices, max_usd, spent_usd
        self.num_requests, self.tokens = 0, Tokens()
        self._reserved_usd, self._num_reserved = Decimal(0), 0
        self._changed = threading.Condition()

    def reserve(self, tokens: Tokens) -> None:
        """Waits while requests in flight might leave enough; raises OutOfBudget where there is not enough without."""
        usd = self._cost(tokens)
        with self._changed:
            while self.max_usd is not None and self.spent_usd + self._reserved_usd + usd > self.max_usd:
                if self._num_reserved == 0:
                    raise OutOfBudget
                self._changed.wait()
            self._reserved_usd += usd
            self._num_reserved += 1
            self.num_requests += 1

    def settle(self, reserved: Tokens, taken: Tokens) -> None:
        with self._changed:
            self._reserved_usd -= self._cost(reserved)
            self._num_reserved -= 1
            self.spent_usd += self._cost(taken)
            self.tokens += taken
            self._changed.notify_all()

    def _cost(self, tokens: Tokens) -> Decimal:
        return Decimal(0) if self.prices is None else self.prices.cost(tokens)


# --- the protocol ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """Where servers of the protocol differ."""

    response_format: str = "json_schema"
    limit_name: str = "max_tokens"


def other_dialect(dialect: Dialect, refusal: str) -> Dialect | None:
    """What to try after a server refused a request (400, 422) with this message; None where nothing is left."""
    # OpenAI's newer models know the limit by its new name only, older servers by the old one only; the refusal says so.
    if dialect.limit_name == "max_tokens" and "max_completion_tokens" in refusal:
        return replace(dialect, limit_name="max_completion_tokens")
    if dialect.response_format == "json_schema":
        return replace(dialect, response_format="json_object")
    return None


def request_body(form: Form, prompt: str, dialect: Dialect) -> bytes:
    """The JSON of a chat completion request."""
    response_format: dict = {"type": dialect.response_format}
    if dialect.response_format == "json_schema":
        response_format["json_schema"] = {"name": form.schema_name, "strict": True, "schema": form.schema}
    content = {
        "model": form.model,
        "messages": [{"role": "system", "content": form.system_message}, {"role": "user", "content": prompt}],
        "response_format": response_format,
        dialect.limit_name: form.max_output_tokens,
    }
    return json.dumps(content).encode()


def _read_completion(data: bytes) -> str:
    """The content of the first choice of a chat completion. Raises InvalidAnswer where there is none or a part."""
    try:
        reply = json.loads(data)
        choice = reply["choices"][0]
        message = choice["message"]
        content, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise InvalidAnswer("the reply is no chat completion") from error
    if refusal or finish == "content_filter":
        raise InvalidAnswer(f"the model refused: {_legible(str(refusal or finish))[:200]}")
    if finish == "length":
        raise InvalidAnswer("the answer was cut at --max-output-tokens")
    if not isinstance(content, str):
        raise InvalidAnswer("the reply has no content")
    return content


def _read_usage(data: bytes) -> Tokens | None:
    """The usage that a chat completion states; None where it states none that makes sense."""
    try:
        usage = json.loads(data)["usage"]
        tokens = Tokens(usage["prompt_tokens"], usage["completion_tokens"])
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    counts = (tokens.input, tokens.output)
    return tokens if all(type(count) is int and count >= 0 for count in counts) else None


def retry_delay(attempt: int, retry_after: str | None, backoff_seconds: float, now: datetime) -> float:
    """Seconds to wait before retry number `attempt` (from 0): twice as long each time, and at least what the server's
    Retry-After asks for; never more than MAX_WAIT_SECONDS."""
    asked = min(retry_after_seconds(retry_after, now), MAX_WAIT_SECONDS)
    return max(backoff(backoff_seconds, attempt + 1, MAX_WAIT_SECONDS), asked)


@dataclass(frozen=True)
class _Reply:
    status: int
    retry_after: str | None
    data: bytes


def _post(endpoint: Endpoint, body: bytes) -> _Reply:
    """Raises Failure: where that was sent, it may have been billed."""
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "proteingpt"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    deadline = time.monotonic() + endpoint.timeout_seconds
    # A redirect would carry the key to another host.
    with send(endpoint.address, body, headers, endpoint.timeout_seconds, follow_redirects=False) as response:
        data = b"".join(read_chunks(response, MAX_REPLY_BYTES, deadline))
        return _Reply(response.status, response.headers.get("Retry-After"), data)


def _error_message(data: bytes, endpoint: Endpoint) -> str:
    """What the server says of an error, in one short line."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        error = json.loads(text)["error"]
        text = f"{error['message']} {error.get('code') or ''}" if isinstance(error, dict) else str(error)
    # Before it is cut, or a piece of the key might be left.
    return endpoint.redact(_legible(text))[:300]


def _legible(text: str) -> str:
    """One line without what a terminal would obey or a file could not hold."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def _plain(text: str) -> str:
    """JSON without its escapes, in which a key could hide; other text as it is."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


class Client:
    """Asks one model at one endpoint; used by several threads."""

    def __init__(self, endpoint: Endpoint, form: Form, ledger: Ledger):
        self.endpoint, self.form, self.ledger = endpoint, form, ledger
        self.stopping = threading.Event()
        # Learned from the server's refusals and answers, for all threads.
        self._dialect, self._reached = Dialect(), False

    def complete(self, prompt: str, meter: list[Tokens]) -> str:
        """The content of the model's answer. Appends to `meter` what each request took.

        Raises InvalidAnswer where there is no content, or the key is in it; RequestFailed, OutOfBudget, Stopped;
        EndpointError where no request can succeed.
        """
        data = self._complete(prompt, meter)
        # First, because the other faults quote from the answer.
        if self.endpoint.holds_key(_plain(data.decode(errors="replace"))):
            raise InvalidAnswer("the reply holds the key")
        content = _read_completion(data)
        if self.endpoint.holds_key(_plain(content)):
            raise InvalidAnswer("the answer holds the key")
        return content

    def request(self, body: bytes, meter: list[Tokens]) -> bytes:
        """The reply to a request of another kind, such as for embeddings; raises as `complete`, and RequestRefused."""
        return self._send(body, meter)

    def _complete(self, prompt: str, meter: list[Tokens]) -> bytes:
        dialect = self._dialect
        while True:
            try:
                data = self._send(request_body(self.form, prompt, dialect), meter)
            except RequestRefused as error:
                other = other_dialect(dialect, str(error))
                if other is None:
                    raise RequestFailed(str(error)) from error
                dialect = other
            else:
                self._dialect = dialect
                return data

    def _send(self, body: bytes, meter: list[Tokens]) -> bytes:
        """One request, repeated after passing faults."""
        for attempt in range(self.endpoint.num_retries + 1):
            retry_after = None
            try:
                reply = self._send_once(body, meter)
            except Failure as error:
                fault = "connection lost" if error.sent else "no connection"
                reason = self.endpoint.redact(_legible(f"{fault}: {error.reason}"))
                self._reached |= error.sent
            else:
                self._reached = True
                if 200 <= reply.status < 300:
                    return reply.data
                reason = self._check_status(reply)
                retry_after = reply.retry_after
            if attempt < self.endpoint.num_retries:
                self._pause(retry_delay(attempt, retry_after, self.endpoint.backoff_seconds, datetime.now(UTC)))
        reason = f"{reason} ({self.endpoint.num_retries + 1} times)"
        if not self._reached:
            raise EndpointError(f"{self.name} cannot be reached: {reason}: check the address and that it is up")
        raise RequestFailed(reason)

    def _send_once(self, body: bytes, meter: list[Tokens]) -> _Reply:
        if self.stopping.is_set():
            raise Stopped
        reserved = estimate_tokens(body, self.form.max_output_tokens)
        self.ledger.reserve(reserved)
        # What may have been billed unseen counts in full.
        taken = reserved
        try:
            reply = _post(self.endpoint, body)
            # Errors are not billed.
            taken = (_read_usage(reply.data) or reserved) if 200 <= reply.status < 300 else Tokens()
            return reply
        except Failure as failure:
            taken = reserved if failure.sent else Tokens()
            raise
        finally:
            self.ledger.settle(reserved, taken)
            meter.append(taken)

    def _check_status(self, reply: _Reply) -> str:
        """What a passing fault says; raises for one that a repetition does not heal."""
        message = _error_message(reply.data, self.endpoint)
        reason = f"HTTP {reply.status} {http.client.responses.get(reply.status, '')}: {message}"
        if reply.status in FATAL_STATUSES or 300 <= reply.status < 400 or "insufficient_quota" in message:
            raise EndpointError(f"{self.name}: {reason}: {self._advice(reply.status)}")
        if reply.status in (400, 422):
            raise RequestRefused(reason)
        if is_passing(reply.status) or reply.status == 409:
            return reason
        raise RequestFailed(reason)

    def _advice(self, status: int) -> str:
        if status == 401 and self.endpoint.key is None:
            return f"it wants a key: export {self.endpoint.key_variable}"
        if status in (401, 403):
            return f"check the key in the environment variable {self.endpoint.key_variable}, and what it may use"
        if 300 <= status < 400:
            return "redirects are not followed, since they would carry the key away: give the final address"
        if status in (404, 405):
            return "check the address (the base, as in https://host/v1) and the model's name"
        return "check the account's credit"

    @property
    def name(self) -> str:
        return f"endpoint {self.endpoint.address}, model {self.form.model}"

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise Stopped
