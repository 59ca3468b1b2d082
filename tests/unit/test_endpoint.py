"""The pure parts of an endpoint: what may be spent, what is sent, and which settings are refused."""

import json
import threading
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from proteingpt.data.open_questions import Options
from proteingpt.endpoint import (
    Dialect,
    Endpoint,
    EndpointError,
    Ledger,
    OutOfBudget,
    Prices,
    Tokens,
    estimate_tokens,
    make_prices,
    other_dialect,
    read_key,
    request_body,
    retry_delay,
)

FORM = Options("tiny", "{num_questions} about {abstract} given {facts}", num_questions=2, max_output_tokens=50).form

# --- money ----------------------------------------------------------------------------------------------------------


def test_tokens_are_reckoned_at_three_bytes_rounded_up_and_the_whole_answer():
    assert estimate_tokens(b"x" * 7, 50) == Tokens(3, 50)
    assert Prices(Decimal("0.1"), Decimal("0.3")).cost(Tokens(10, 20)) == Decimal("0.007")


@pytest.mark.parametrize("value", ["-1", "much", "nan", "inf", ""])
def test_an_amount_that_is_none_is_refused_by_its_option(value):
    with pytest.raises(EndpointError, match="--usd-per-1k-output is"):
        make_prices("0.1", value)


def test_one_price_alone_is_refused():
    assert make_prices(None, None) is None
    with pytest.raises(EndpointError, match="give both"):
        make_prices("0.1", None)


def test_a_reservation_waits_for_what_is_in_flight_and_is_refused_when_nothing_is():
    """A budget of 10 with 1 USD for each token: 6 are reserved; 5 more fit only once those have settled at 4."""
    ledger = Ledger(Prices(Decimal(1000), Decimal(0)), Decimal(10))
    ledger.reserve(Tokens(6))
    waiting = threading.Thread(target=ledger.reserve, args=(Tokens(5),))
    waiting.start()
    assert ledger.num_requests == 1
    ledger.settle(Tokens(6), Tokens(4))
    waiting.join(timeout=30)
    assert ledger.num_requests == 2
    ledger.settle(Tokens(5), Tokens(5))
    assert ledger.spent_usd == 9
    with pytest.raises(OutOfBudget):
        ledger.reserve(Tokens(2))
    ledger.reserve(Tokens(1))


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_a_delay_doubles_heeds_retry_after_in_seconds_or_as_a_date_and_is_bounded():
    now = datetime(2024, 5, 1, 12, 0, 0, tzinfo=UTC)
    assert [retry_delay(attempt, None, 0.5, now) for attempt in range(4)] == [0.5, 1.0, 2.0, 4.0]
    for retry_after, wanted in (
        ("7", 7.0),
        ("0", 1.0),
        ("Wed, 01 May 2024 12:00:30 GMT", 30.0),
        ("Wed, 01 May 2024 11:00:00 GMT", 1.0),
        ("86400", 120.0),
        ("inf", 120.0),
        ("nan", 1.0),
        ("soon", 1.0),
    ):
        assert retry_delay(0, retry_after, 1.0, now) == wanted, retry_after
    assert retry_delay(60, None, 1.0, now) == 120.0


def test_the_dialect_changes_once_for_the_format_and_once_for_the_limit():
    limit = other_dialect(Dialect(), "Use 'max_completion_tokens' instead")
    assert limit == Dialect("json_schema", "max_completion_tokens")
    both = other_dialect(limit, "use 'max_completion_tokens', no json_schema")
    assert both == Dialect("json_object", "max_completion_tokens")
    assert other_dialect(both, "max_completion_tokens") is None
    assert other_dialect(Dialect(), "no") == Dialect("json_object", "max_tokens")


def test_a_request_asks_for_strict_json_with_question_and_answer():
    body = json.loads(request_body(FORM, "the prompt", Dialect()))
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] is True and body["messages"][1] == {"role": "user", "content": "the prompt"}
    items = schema["schema"]["properties"]["pairs"]["items"]
    assert sorted(items["required"]) == ["answer", "question"] and items["additionalProperties"] is False
    plain = json.loads(request_body(FORM, "the prompt", Dialect("json_object")))
    assert plain["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    "url", ["", "host/v1", "ftp://host/v1", "http://", "http://h:port/v1", "http://h/a b", "http://[/"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(EndpointError, match="--qa-endpoint is"):
        Endpoint(url)


@pytest.mark.parametrize("url", ["https://user:hidden@h/v1", "https://h/v1?key=hidden", "https://h/v1#hidden"])
def test_credentials_in_an_address_are_refused_and_not_repeated(url):
    with pytest.raises(EndpointError, match="with the key in the environment") as error:
        Endpoint(url)
    assert "hidden" not in str(error.value)


def test_the_address_is_the_base_or_the_whole():
    for url in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert Endpoint(url).address == "http://h/v1/chat/completions"


@pytest.mark.parametrize("key", ["hidden-in-two lines", "hidden\n", "hidden-\u00e9", ""])
def test_a_key_that_no_header_carries_is_refused_by_its_variable_and_not_shown(key):
    with pytest.raises(EndpointError, match="environment variable MY_KEY") as error:
        Endpoint("http://h/v1", key, "MY_KEY")
    assert "hidden" not in str(error.value)


def test_a_key_is_read_from_the_environment_and_is_not_in_the_representation():
    environ = {"OPENAI_API_KEY": "hidden-default-key", "OTHER": "hidden-other-key"}
    assert read_key(None, environ) == "hidden-default-key" and read_key("OTHER", environ) == "hidden-other-key"
    assert read_key(None, {}) is None
    with pytest.raises(EndpointError, match="variable OTHER is not set"):
        read_key("OTHER", {})
    assert "hidden" not in repr(Endpoint("http://h/v1", "hidden-default-key"))


@pytest.mark.parametrize(
    "settings",
    [{"timeout_seconds": 0}, {"num_retries": -1}, {"backoff_seconds": -1.0}, {"timeout_seconds": float("nan")}],
)
def test_impatient_settings_are_refused(settings):
    with pytest.raises(EndpointError, match="wanted a timeout above zero"):
        Endpoint("http://h/v1", **settings)
