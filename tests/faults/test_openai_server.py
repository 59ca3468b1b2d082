"""Open questions against a real local server of the protocol, with every fault we could think of: what is paid for is
kept, nothing is asked twice, no more is spent than allowed, and the key appears nowhere."""

import json
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from commands import REPOSITORY, environment
from openai_server import Fault, OpenAIServer, good_content

from proteingpt.data.open_questions import (
    DEFAULT_PROMPT,
    OpenQuestionsError,
    Options,
    Subject,
    read_generated,
    read_prompt,
)
from proteingpt.data.open_questions_command import format_summary
from proteingpt.data.open_questions_run import generate
from proteingpt.endpoint import BYTES_PER_TOKEN, Endpoint, EndpointError, Prices

KEY = "sk-very-secret-0123456789abcdef"
PIECES = ("very-secret", "0123456789")
OPTIONS = Options("tiny", read_prompt(DEFAULT_PROMPT), num_questions=2, max_output_tokens=50)
NAMES = ("Insulin", "Myosin", "Trypsin", "Keratin", "Ferritin", "Elastin")
SUBJECTS = [Subject(f"{i}abc", f"{name} is described.", "num models: 1") for i, name in enumerate(NAMES, 1)]
# The server answers a request with 100 and 50 tokens: 0.0001 x 100 + 0.0002 x 50 = 0.02 USD.
PRICES = Prices(Decimal("0.1"), Decimal("0.2"))


def ask(server, out, subjects=SUBJECTS[:1], *, retries=3, timeout=20.0, workers=1, options=OPTIONS, **settings):
    endpoint = Endpoint(server.url, KEY, timeout_seconds=timeout, num_retries=retries, backoff_seconds=0.01)
    return generate(subjects, out, endpoint, options, workers=workers, **settings)


def answers(out) -> dict[str, str]:
    return {entry: turns[0].answer for entry, turns in read_generated(out).items()}


def test_each_protein_is_asked_about_once_and_gets_the_answers_to_its_own_abstract(tmp_path):
    with OpenAIServer(key=KEY) as server:
        summary = ask(server, tmp_path / "qa.jsonl", SUBJECTS, workers=3)
        assert (summary.num_done, summary.num_pairs, summary.num_requests) == (6, 12, 6)
        assert answers(tmp_path / "qa.jsonl") == {s.id: f"Role 0 is that of {n}." for s, n in zip(SUBJECTS, NAMES)}
        assert len(server.requests) == 6 and server.most_in_flight <= 3
        sent = server.requests[0].body
        assert sent["model"] == "tiny" and sent["max_tokens"] == 50
        assert sent["response_format"]["type"] == "json_schema"
        assert "num models: 1" in server.requests[0].prompt and "write 2 questions" in server.requests[0].prompt


def test_a_second_run_makes_no_request_and_a_changed_subject_one(tmp_path):
    with OpenAIServer() as server:
        ask(server, tmp_path, SUBJECTS)
        written = (tmp_path / "open_questions.jsonl").read_bytes()
        again = ask(server, tmp_path, SUBJECTS)
        assert (again.num_cached, again.num_done, again.num_requests, len(server.requests)) == (6, 0, 0, 6)
        assert (tmp_path / "open_questions.jsonl").read_bytes() == written
        changed = [Subject("1abc", "Casein is described.", "num models: 1"), *SUBJECTS[1:]]
        assert ask(server, tmp_path, changed).num_requests == 1
        assert answers(tmp_path)["1abc"] == "Role 0 is that of Casein."
        # Back to the first abstract: its answer is still in the file, and counts again.
        assert ask(server, tmp_path, SUBJECTS).num_requests == 0
        assert answers(tmp_path)["1abc"] == "Role 0 is that of Insulin."


def test_entries_of_one_paper_with_the_same_facts_are_asked_about_once(tmp_path):
    twins = [Subject(entry, "Insulin is described.") for entry in ("1abc", "2abc")]
    with OpenAIServer() as server:
        assert ask(server, tmp_path, twins).num_requests == 1
        assert ask(server, tmp_path, [*twins, Subject("3abc", "Insulin is described.")]).num_requests == 0
    assert answers(tmp_path) == dict.fromkeys(("1abc", "2abc", "3abc"), "Role 0 is that of Insulin.")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=429),
        Fault(status=500),
        Fault(status=503),
        Fault(status=408),
        Fault(cut="silent"),
        Fault(cut="body"),
        Fault(body=b"<html>proxy</html>"),
        Fault(body=b"[" * 100_000),
        Fault(body=b"x" * (5 << 20)),
        Fault(content="I would rather talk."),
        Fault(content='{"pairs": [{"question": "a?"}]}'),
        Fault(content='{"pairs": []}'),
        Fault(content=json.dumps({"pairs": [{"question": "What is 1ABC?", "answer": "A protein."}]})),
        Fault(content=json.dumps({"pairs": [{"question": "What?", "answer": "x" * 5000}]})),
        Fault(refusal="I must not."),
        Fault(finish="length"),
        Fault(finish="content_filter"),
    ],
    ids=lambda fault: str({k: v for k, v in vars(fault).items() if v not in ("", None, "stop", 200)})[:60],
)
def test_a_passing_fault_costs_one_more_request_and_nothing_else(tmp_path, fault):
    with OpenAIServer([fault]) as server:
        summary = ask(server, tmp_path)
        assert (summary.num_done, summary.num_requests, len(server.requests)) == (1, 2, 2)
    assert answers(tmp_path) == {"1abc": "Role 0 is that of Insulin."}


def test_a_reply_that_does_not_come_in_time_is_asked_for_again(tmp_path):
    with OpenAIServer([Fault(hang_seconds=2.0)]) as server:
        summary = ask(server, tmp_path, timeout=0.5)
        assert summary.num_done == 1 and summary.num_requests >= 2


def test_the_server_s_retry_after_is_waited_for(tmp_path):
    """Three repetitions at 0.01, 0.02 and 0.04 s would all come within the second in which this server refuses."""
    with OpenAIServer(patience_seconds=1.0) as server:
        summary = ask(server, tmp_path)
        assert summary.num_done == 1 and len(server.requests) == 2


def test_a_server_that_refuses_json_schema_is_asked_by_json_object_and_that_is_remembered(tmp_path):
    with OpenAIServer(formats=("json_object",)) as server:
        assert ask(server, tmp_path, SUBJECTS[:3]).num_done == 3
        assert [seen.body["response_format"]["type"] for seen in server.requests] == [
            "json_schema", "json_object", "json_object", "json_object",
        ]  # fmt: skip


def test_a_server_that_knows_the_output_limit_by_its_new_name_only_gets_it_so(tmp_path):
    with OpenAIServer(limit_name="max_completion_tokens", formats=("json_object",)) as server:
        assert ask(server, tmp_path, SUBJECTS[:2]).num_done == 2
        assert len(server.requests) == 4
        assert server.requests[-1].body["max_completion_tokens"] == 50


@pytest.mark.parametrize("status, advice", [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "model's name")])
def test_a_refusal_that_no_repetition_heals_stops_at_once_and_names_endpoint_and_model(tmp_path, status, advice):
    with OpenAIServer(always=Fault(status=status, message="no")) as server:
        with pytest.raises(EndpointError) as error:
            ask(server, tmp_path, SUBJECTS)
        assert len(server.requests) == 1
    for part in (server.url, "model tiny", f"HTTP {status}", advice):
        assert part in str(error.value)


def test_a_redirect_is_not_followed_since_it_would_carry_the_key_away(tmp_path):
    with OpenAIServer() as other, OpenAIServer() as server:
        server.always = Fault(status=302, headers={"Location": f"{other.url}/chat/completions"})
        with pytest.raises(EndpointError, match="redirects are not followed"):
            ask(server, tmp_path)
        assert other.requests == []


def test_an_endpoint_that_is_not_there_is_named_after_the_bounded_repetitions(tmp_path):
    with OpenAIServer() as server:
        pass
    with pytest.raises(EndpointError, match=r"cannot be reached: no connection.* \(4 times\)"):
        ask(server, tmp_path, SUBJECTS, prices=PRICES)
    # Nothing was sent, so nothing is counted as spent.
    assert (tmp_path / "open_questions.jsonl").read_bytes() == b""


def test_a_reply_that_is_cut_is_a_lost_connection_and_no_invalid_answer(tmp_path):
    """The next run asks again; http.client itself does not tell a cut body from a whole one."""
    with OpenAIServer([Fault(cut="body")]) as server:
        assert "connection lost" in ask(server, tmp_path, retries=0).set_aside["1abc"]
        assert ask(server, tmp_path).num_done == 1


def test_invalid_answers_are_bounded_set_aside_by_name_and_not_asked_about_again_unless_told(tmp_path):
    bad = Fault(content='{"pairs": [{"question": "Why?", "answer": "I\'m sorry, I cannot."}]}')
    with OpenAIServer([bad, bad, bad]) as server:
        summary = ask(server, tmp_path, SUBJECTS[:2])
        assert (summary.num_done, len(server.requests)) == (1, 4)
        assert list(summary.set_aside) == ["1abc"] and "is no answer" in summary.set_aside["1abc"]
        assert "set aside 1abc: 3 invalid answers" in format_summary(summary)
        assert list(read_generated(tmp_path)) == ["2abc"]
        assert ask(server, tmp_path, SUBJECTS[:2]).num_requests == 0
        assert ask(server, tmp_path, SUBJECTS[:2], retry_set_aside=True).num_requests == 1
        assert sorted(read_generated(tmp_path)) == ["1abc", "2abc"]


def test_a_protein_whose_requests_fail_is_set_aside_and_asked_about_in_the_next_run(tmp_path):
    with OpenAIServer([None, *[Fault(status=500)] * 4]) as server:
        summary = ask(server, tmp_path, SUBJECTS[:3])
        assert summary.num_done == 2 and "HTTP 500" in summary.set_aside["2abc"]
        assert len(server.requests) == 6
        assert ask(server, tmp_path, SUBJECTS[:3]).num_requests == 1
    assert len(read_generated(tmp_path)) == 3


def test_a_request_that_the_server_will_not_have_is_not_repeated(tmp_path):
    """A context that is too long, say: by json_schema, by json_object, and no more."""
    with OpenAIServer([Fault(status=400, message="context too long")] * 2) as server:
        summary = ask(server, tmp_path, SUBJECTS[:2])
        assert "context too long" in summary.set_aside["1abc"] and summary.num_done == 1
        assert len(server.requests) == 3


@pytest.mark.parametrize("text", ["\ud800", "\x1b[2J"])
def test_what_a_server_says_reaches_file_and_terminal_in_legible_form(tmp_path, text):
    """Half of a surrogate pair, which UTF-8 does not hold, and an escape sequence, which a terminal obeys."""
    faults = [*[Fault(refusal=f"no {text} no")] * 3, *[Fault(status=400, message=f"bad {text} bad")] * 2]
    with OpenAIServer(faults) as server:
        summary = ask(server, tmp_path, SUBJECTS[:2])
    shown = format_summary(summary)
    assert len(summary.set_aside) == 2 and "no ?" in shown and "bad ?" in shown
    assert shown.replace("\n", "").isprintable()
    assert read_generated(tmp_path) == {}


def test_a_server_that_always_fails_ends_the_run_before_every_protein_is_lost(tmp_path):
    with OpenAIServer(always=Fault(content="nonsense")) as server:
        with pytest.raises(EndpointError, match="2 proteins in a row were set aside, the last because: 3 invalid"):
            ask(server, tmp_path, SUBJECTS, max_failures_in_a_row=2)
        assert len(server.requests) == 6


# --- money ----------------------------------------------------------------------------------------------------------


def reserve(server) -> Decimal:
    """What a request is reckoned at before it is sent, by hand: a token for each 3 bytes, 50 tokens of answer."""
    num_input = -(-len(server.requests[0].raw) // BYTES_PER_TOKEN)
    return (num_input * Decimal("0.1") + 50 * Decimal("0.2")) / 1000


def test_the_run_ends_before_the_budget_could_be_exceeded_exactly(tmp_path):
    """Each request takes 0.02 USD. The third may be sent when 0.04 USD and its own estimate are within the budget."""
    same_length = [Subject(f"{i}abc", f"Abc{i}in is described.") for i in range(1, 7)]
    with OpenAIServer() as server:
        ask(server, tmp_path / "first", same_length[:1])
        enough = Decimal("0.04") + reserve(server)
        for name, max_usd, wanted in (("enough", enough, 3), ("short", enough - Decimal("0.000001"), 2)):
            before = len(server.requests)
            summary = ask(server, tmp_path / name, same_length, prices=PRICES, max_usd=max_usd)
            assert len(server.requests) - before == summary.num_requests == wanted
            assert summary.usd == summary.total_usd == wanted * Decimal("0.02") <= max_usd
            assert (summary.num_done, summary.num_left, summary.set_aside) == (wanted, 6 - wanted, {})
            assert f"{6 - wanted} proteins are left" in format_summary(summary)


def test_the_budget_holds_for_the_output_in_all_and_a_larger_one_goes_on(tmp_path):
    with OpenAIServer() as server:
        ask(server, tmp_path / "first")
        budget = Decimal("0.04") + reserve(server)
        assert ask(server, tmp_path, SUBJECTS, prices=PRICES, max_usd=budget).num_done == 3
        again = ask(server, tmp_path, SUBJECTS, prices=PRICES, max_usd=budget)
        assert (again.num_requests, again.num_left, again.usd, again.total_usd) == (0, 3, 0, Decimal("0.06"))
        assert ask(server, tmp_path, SUBJECTS, prices=PRICES, max_usd=Decimal(9)).total_usd == Decimal("0.12")


def test_threads_together_do_not_exceed_the_budget(tmp_path):
    with OpenAIServer(delay_seconds=0.02) as server:
        ask(server, tmp_path / "first")
        budget = Decimal("0.05") + reserve(server)
        summary = ask(server, tmp_path, SUBJECTS, prices=PRICES, max_usd=budget, workers=6)
        # As many as one after the other: who finds no room waits for those in flight to settle.
        assert summary.num_requests == 3 and summary.usd == Decimal("0.06")


def test_repeated_and_lost_requests_are_paid_for_errors_are_not(tmp_path):
    """An invalid answer costs its usage, a connection that was cut its estimate, a 500 nothing; then the good one."""
    faults = [Fault(content="nonsense"), Fault(cut="silent"), Fault(status=500), None]
    with OpenAIServer(faults) as server:
        summary = ask(server, tmp_path, prices=PRICES)
        assert len(server.requests) == 4
        assert summary.usd == Decimal("0.02") * 2 + reserve(server)
    assert Decimal(json.loads((tmp_path / "open_questions.jsonl").read_text())["usd"]) == summary.usd


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": "3"}, 7])
def test_a_reply_without_a_sensible_usage_counts_at_its_estimate(tmp_path, usage):
    with OpenAIServer([Fault(usage=usage)]) as server:
        assert ask(server, tmp_path, prices=PRICES).usd == reserve(server)


def test_a_budget_without_prices_is_refused_before_any_request(tmp_path):
    with OpenAIServer() as server, pytest.raises(OpenQuestionsError, match="--max-usd needs the prices"):
        ask(server, tmp_path, max_usd=Decimal(1))
    assert server.requests == []


# --- the command, its key and its death -----------------------------------------------------------------------------


def command(server, directory, *extra, key=KEY):
    variables = environment() | {"MY_KEY": key}
    variables.pop("OPENAI_API_KEY", None)
    return subprocess.Popen(
        [sys.executable, REPOSITORY / "launch" / "open_questions.py", "--abstracts", directory / "abstract.json",
         "--qa-endpoint", server.url, "--model", "tiny", "--key-variable", "MY_KEY", "--questions-per-protein", "2",
         "--out", directory / "qa.jsonl", "--backoff-seconds", "0.01", "--retries", "2", *extra],
        cwd=directory, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def write_abstracts(directory: Path, num: int = 6) -> None:
    abstracts = [{"pdb_id": f"{i}xyz", "caption": f"Protein{i}in is described."} for i in range(num)]
    (directory / "abstract.json").write_text(json.dumps(abstracts))


def everything_in(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "faults, returncode",
    [
        ((), 0),
        # Servers that say back what they were given: in errors, in the answer, escaped.
        ([Fault(status=500, message=f"got {KEY}"), Fault(status=422, message=f"bad {KEY}")] * 3, 0),
        ([Fault(content=good_content("x").replace("Role 0", KEY))] * 3, 0),
        ([Fault(content=good_content("x").replace("Role 0", "\\u0073" + KEY[1:]))] * 3, 0),
        ([Fault(content=json.dumps({"pairs": [{"question": "What?", "answer": f"I'm sorry {KEY}"}]}))] * 3, 0),
        ([Fault(refusal=f"no {KEY}")] * 3, 0),
        # Where a message is cut short, no piece of the key may be left.
        *(([Fault(status=500, message="x" * n + KEY)] * 3, 0) for n in (240, 265, 280)),
        *(([Fault(refusal="x" * n + KEY)] * 3, 0) for n in (175, 185)),
        *(([Fault(content=json.dumps([{"question": "What?", "answer": "Sorry " + "x" * n + KEY}]))] * 3, 0)
          for n in (30, 40)),
        ([Fault(status=403, message=f"refused: Bearer {KEY}")], 1),
    ],
)
def test_the_key_is_in_no_file_and_no_output_whatever_the_server_says(tmp_path, faults, returncode):
    write_abstracts(tmp_path, 3)
    with OpenAIServer(faults, key=KEY) as server:
        process = command(server, tmp_path, "--workers", "1", "--max-failures-in-a-row", "9")
        out, err = process.communicate(timeout=60)
        assert process.returncode == returncode, err
        assert all(seen.headers["Authorization"] == f"Bearer {KEY}" for seen in server.requests) and server.requests
    for piece in PIECES:
        assert piece.encode() not in everything_in(tmp_path) and piece not in out + err
    assert "Traceback" not in err
    assert (tmp_path / "qa.jsonl").stat().st_size > 0 or returncode


def test_a_wrong_or_unusable_key_is_named_by_its_variable_and_never_shown(tmp_path):
    write_abstracts(tmp_path, 2)
    with OpenAIServer(key="sk-another-key-entirely") as server:
        for key in (KEY, KEY + "\n", f'"{KEY} "'):
            process = command(server, tmp_path, key=key)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 1 and "MY_KEY" in err and "Traceback" not in err
            for piece in PIECES:
                assert piece.encode() not in everything_in(tmp_path) and piece not in out + err


def test_a_run_that_is_killed_goes_on_and_pays_for_nothing_finished_twice(tmp_path):
    """SIGKILL after some answers; the line being written is torn, as a kill can leave it; then the same command."""
    write_abstracts(tmp_path, 12)
    with OpenAIServer(delay_seconds=0.1) as server:
        process = command(server, tmp_path, "--workers", "2")
        deadline = time.monotonic() + 60
        while not (tmp_path / "qa.jsonl").exists() or (tmp_path / "qa.jsonl").read_bytes().count(b"\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        finished = (tmp_path / "qa.jsonl").read_bytes()
        num_finished = finished.count(b"\n")
        assert 3 <= num_finished < 12
        with open(tmp_path / "qa.jsonl", "ab") as file:
            file.write(finished.splitlines()[0][:40])
        assert len(read_generated(tmp_path / "qa.jsonl")) == num_finished
        out, err = command(server, tmp_path).communicate(timeout=60)
        assert f"{num_finished} answered already, {12 - num_finished} answered now" in out, err
        assert f"\n{12 - num_finished} requests" in out
        # What was in flight when the kill came is lost, and no more: one request for each of the two threads.
        assert len(server.requests) <= 12 + 2
    assert (tmp_path / "qa.jsonl").read_bytes().startswith(finished)
    assert answers(tmp_path / "qa.jsonl") == {f"{i}xyz": f"Role 0 is that of Protein{i}in." for i in range(12)}


def test_two_runs_do_not_write_to_one_file(tmp_path):
    write_abstracts(tmp_path)
    with OpenAIServer(delay_seconds=0.3) as server:
        first = command(server, tmp_path, "--workers", "1")
        while not server.requests:
            assert first.poll() is None
            time.sleep(0.01)
        with pytest.raises(OpenQuestionsError, match="another run writes to it"):
            ask(server, tmp_path / "qa.jsonl")
        assert "6 answered now" in first.communicate(timeout=60)[0]


def test_a_dry_run_makes_no_request_writes_nothing_and_reckons_by_hand_count(tmp_path):
    write_abstracts(tmp_path, 3)
    with OpenAIServer() as server:
        prices = ("--usd-per-1k-input", "0.1", "--usd-per-1k-output", "0.2", "--max-output-tokens", "50")
        out, err = command(server, tmp_path, *prices, "--dry-run").communicate(timeout=60)
        assert server.requests == [] and list(tmp_path.iterdir()) == [tmp_path / "abstract.json"]
        command(server, tmp_path, *prices).communicate(timeout=60)
        num_input = sum(-(-len(seen.raw) // BYTES_PER_TOKEN) for seen in server.requests)
        usd = (num_input * Decimal("0.1") + 3 * 50 * Decimal("0.2")) / 1000
    assert "3 proteins, 0 of them answered already, 3 requests to make" in out, err
    assert f"about {num_input} tokens" in out and "at most 150 tokens" in out and f"about {usd:.4f} USD" in out
    out, _ = command(server, tmp_path, *prices, "--dry-run").communicate(timeout=60)
    assert "3 proteins, 3 of them answered already, 0 requests" in out and "0.0600 USD spent on this output" in out


def test_ctrl_c_keeps_what_was_in_flight(tmp_path):
    write_abstracts(tmp_path, 12)
    with OpenAIServer(delay_seconds=0.3) as server:
        process = command(server, tmp_path, "--workers", "2")
        while len(server.requests) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "the same command goes on" in err and "Traceback" not in err
        assert len(read_generated(tmp_path / "qa.jsonl")) == len(server.requests) < 12
