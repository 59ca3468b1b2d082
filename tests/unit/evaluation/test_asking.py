"""Endpoints, against a real server on loopback: what is kept, what it costs, and that nothing missing becomes a
zero."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from openai_server import Fault, OpenAIServer

from proteingpt.evaluation.asking import (
    Asker,
    Replies,
    Service,
    chat_answers,
    chat_form,
    embedding_form,
    endpoint_embedder,
    judge,
    judge_form,
    read_mark,
    read_rubric,
)
from proteingpt.evaluation.predictions import EvaluationError
from proteingpt.protein import Turn

PATIENCE = dict(timeout_seconds=5.0, num_retries=1, backoff_seconds=0.01)
TRIPLES = [("Large?", "YES", "yes"), ("Large?", "YES", "no"), ("What?", "A {kinase}", "A kinase")]


def mark(prompt: str) -> str:
    return json.dumps({"score": 0 if "mark: no" in prompt else 9, "reason": "seen"})


def asker(server, replies, form, kind="judge", max_usd=None, prices=None) -> Asker:
    return Asker(Service(kind, server.url, "m", prices), form, replies, max_usd, **PATIENCE)


@pytest.fixture
def replies(tmp_path):
    made = Replies(tmp_path / "replies.sqlite")
    yield made
    made.close()


def test_marks_are_given_once_and_kept(replies):
    with OpenAIServer(answer=mark) as server:
        first = judge(asker(server, replies, judge_form("m")), read_rubric(None), [*TRIPLES, TRIPLES[0]])
        assert first == dict(zip(TRIPLES, (0.9, 0.0, 0.9), strict=True))
        assert len(server.requests) == 3  # the one asked twice was sent once
        again = judge(asker(server, replies, judge_form("m")), read_rubric(None), TRIPLES)
        assert again == first and len(server.requests) == 3
        judge(asker(server, replies, judge_form("another model")), read_rubric(None), TRIPLES[:1])
        assert len(server.requests) == 4


@pytest.mark.parametrize("content", ["no json", '{"score": 11, "reason": ""}', '{"score": true, "reason": ""}', "[]"])
def test_what_the_judge_does_not_mark_is_not_a_zero(replies, content):
    with OpenAIServer(always=Fault(content=content)) as server:
        assert judge(asker(server, replies, judge_form("m")), read_rubric(None), TRIPLES[:1]) == {TRIPLES[0]: None}


def test_the_bound_holds_over_runs_and_what_was_paid_for_is_kept(replies):
    """Each answer is billed at 100 + 50 tokens, 0.15 dollars at one per thousand; a request may cost more
    beforehand."""
    prices = ("1", "1")
    with OpenAIServer(answer=mark) as server:
        with pytest.raises(EvaluationError, match="--max-usd is reached.*larger bound"):
            judge(asker(server, replies, judge_form("m"), max_usd="0.1", prices=prices), read_rubric(None), TRIPLES)
        assert not server.requests
        judge(asker(server, replies, judge_form("m"), max_usd="1.0", prices=prices), read_rubric(None), TRIPLES[:1])
        assert float(replies.spent_usd) == pytest.approx(0.15)
        with pytest.raises(EvaluationError, match="--max-usd is reached"):
            judge(asker(server, replies, judge_form("m"), max_usd="0.2", prices=prices), read_rubric(None), TRIPLES)
        done = judge(asker(server, replies, judge_form("m"), max_usd="5", prices=prices), read_rubric(None), TRIPLES)
        assert None not in done.values() and len(server.requests) == 3
        assert float(replies.spent_usd) == pytest.approx(0.45)


def test_what_was_spent_is_on_disk_before_the_run_ends(replies):
    """A run that is killed leaves its costs behind: 150 tokens at a dollar per thousand."""
    with OpenAIServer(answer=mark) as server:
        one = asker(server, replies, judge_form("m"), max_usd="5", prices=("1", "1"))
        one.answer(read_rubric(None).format(question="Q", answer="A", prediction="A"), read_mark)
        assert float(replies.spent_usd) == pytest.approx(0.15)


def test_a_bound_without_prices_is_refused(replies):
    with OpenAIServer() as server, pytest.raises(EvaluationError, match="give --judge-prices INPUT,OUTPUT"):
        asker(server, replies, judge_form("m"), max_usd="1")


def test_an_endpoint_that_cannot_be_reached_or_wants_a_key_is_named_with_its_setting(replies):
    service = Service("judge", "ftp://host", "m")
    with pytest.raises(EvaluationError, match="--judge-endpoint"):
        Asker(service, judge_form("m"), replies, None)
    with OpenAIServer(key="k" * 20) as server, pytest.raises(EvaluationError, match="wants a key"):
        judge(asker(server, replies, judge_form("m")), read_rubric(None), TRIPLES)


@pytest.mark.parametrize("text", ["no places", "{question} {answer}", "{question} {answer} {prediction} {other}", "{"])
def test_a_rubric_that_lacks_a_text_is_refused(tmp_path, text):
    path = tmp_path / "rubric.txt"
    path.write_text(text)
    with pytest.raises(EvaluationError, match="--judge-rubric"):
        read_rubric(str(path))


def test_a_chat_model_sees_the_sequence_and_answers_each_question(replies):
    turns = (Turn("Large?", "YES"), Turn("", "A protein."))

    def answer(prompt):
        assert "MKVLA" in prompt and "1. Large?" in prompt and "2. Describe" in prompt
        return json.dumps({"answers": ["no", "a text"]})

    with OpenAIServer(answer=answer) as server:
        one = asker(server, replies, chat_form("m", 2), kind="chat")
        assert chat_answers(one, "MKVLA", turns) == ["no", "a text"]
        assert chat_answers(one, "MKVLA", turns) == ["no", "a text"] and len(server.requests) == 1
        assert chat_answers(one, "MKVLA", turns[:1] * 3) is None  # two answers to three questions


class Embeddings:
    """A server of the protocol's /embeddings: a vector of letter counts, in another order than asked."""

    def __init__(self, broken: bool = False):
        server, self.batches = self, []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/embeddings" and body["model"] == "m"
                server.batches.append(body["input"])
                data = [{"index": i, "embedding": [t.count("a"), t.count("b"), 1]} for i, t in enumerate(body["input"])]
                reply = {"data": data[:-1] if broken else data[::-1], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
                text = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def test_embeddings_come_in_the_order_of_the_texts_and_once(replies):
    texts = [f"{'a' * i}{'b' * (i % 3)}" for i in range(1, 70)]
    with Embeddings() as server:
        embed = endpoint_embedder(asker(server, replies, embedding_form("m"), kind="embedding"))
        np.testing.assert_array_equal(embed(texts), [[t.count("a"), t.count("b"), 1] for t in texts])
        assert sorted(map(len, server.batches)) == [5, 32, 32]
        np.testing.assert_array_equal(embed(texts[:3]), embed(texts)[:3])
        assert len(server.batches) == 3


def test_a_missing_embedding_is_an_error_and_no_zero(replies):
    with Embeddings(broken=True) as server, pytest.raises(EvaluationError, match="no embeddings of 2 texts"):
        endpoint_embedder(asker(server, replies, embedding_form("m"), kind="embedding"))(["a", "b"])
