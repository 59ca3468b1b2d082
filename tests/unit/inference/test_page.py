"""The server behind the page, over real sockets: what it answers, what it refuses, and that it goes on."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from proteingpt.inference import page as pages
from proteingpt.inference import subject
from proteingpt.inference.conversation import Exchange, as_json, as_markdown
from proteingpt.inference.page import Bounds, Page
from proteingpt.inference.upload import Limits
from proteingpt.model import attention

BOUNDS = Bounds(upload=Limits(packed_bytes=200_000), json_bytes=300_000, question_letters=100, idle_seconds=5)


@contextmanager
def serving(assistant, bounds=BOUNDS):
    page = Page(("127.0.0.1", 0), assistant, "runs/x/model", bounds)
    thread = threading.Thread(target=page.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield page
    finally:
        page.shutdown()
        thread.join()
        page.server_close()


@pytest.fixture(scope="module")
def page(assistant):
    with serving(assistant) as page:
        yield page


def send(page, method, path, body=None, **headers):
    """(status, headers, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def post(page, path, values, **headers):
    status, _, body = send(page, "POST", path, json.dumps(values), **headers)
    return status, body


def refused(answer) -> tuple[int, str]:
    return answer[0], json.loads(answer[-1])["error"]


def question(protein=None, text="What is it?"):
    return {"protein": subject.to_json(protein or subject.protein_of_sequence("MKTAYIAKQR")), "question": text}


def lines_of(body: bytes) -> list[dict]:
    return [json.loads(line) for line in body.splitlines()]


# -------------------------------------------------------------------------------------------------------------- answers


def test_every_answer_forbids_what_a_page_does_not_need(page):
    for path in (*pages.STATIC, "/about", "/nothing"):
        _, headers, _ = send(page, "GET", path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_viewer_is_shipped_with_its_licence(page):
    assert b"$3Dmol" in send(page, "GET", "/3Dmol-min.js")[2]
    licence = send(page, "GET", "/3Dmol-LICENSE.txt")[2]
    assert licence.startswith(b"3Dmol.js 2.5.5, ") and b"BSD-3-Clause" in licence


def test_upload_ask_and_answer(page, assistant, demo_assets):
    status, _, body = send(page, "POST", "/read?name=mine.pdb&chain=A", (demo_assets / "example.pdb").read_bytes())
    found = json.loads(body)
    assert status == 200 and found["chains"] == ["A"] and found["missing"] == [] and "ATOM" in found["pdb"]
    assert found["name"] == "mine_A" and "with coordinates" in found["summary"]
    _, protein = subject.read_structure(demo_assets / "example.pdb")
    status, body = post(page, "/ask", {"protein": found["protein"], "question": "What is it?"})
    told = lines_of(body)
    wanted = assistant.ask(protein, ["What is it?"])[0]
    pieces = [line["piece"] for line in told if "piece" in line]
    assert told[-1] == {"answer": wanted} and "".join(pieces) == wanted and len(pieces) > 1


def test_a_pasted_sequence_says_what_is_missing(page):
    status, _, body = send(page, "POST", "/read?sequence=%3Emine%0Amktay")
    found = json.loads(body)
    assert (
        status == 200 and found["name"] == "mine" and found["protein"]["sequence"] == "MKTAY" and found["pdb"] is None
    )
    assert "No structure" in found["missing"][0] and found["unresolved"] == [0, 1, 2, 3, 4]


def test_a_structure_with_a_sequence_for_it(page, demo_assets):
    """One letter is another; the coordinates stay the file's. A sequence of another length is refused."""
    data = (demo_assets / "example.pdb").read_bytes()
    _, protein = subject.read_structure(demo_assets / "example.pdb")
    first = "W" if protein.sequence[0] != "W" else "G"
    found = json.loads(
        send(page, "POST", f"/read?name=mine.pdb&sequence=%3Ex%0A{first}{protein.sequence[1:]}", data)[2]
    )
    assert found["name"] == "mine_A+sequence" and found["protein"]["sequence"] == first + protein.sequence[1:]
    assert found["protein"]["backbone"] == subject.to_json(protein)["backbone"]
    assert found["missing"] == [
        f"1 of 57 residues given differs from the file's ({protein.sequence[0]}1{first}): the model gets those given."
    ]
    status, said = refused(send(page, "POST", "/read?name=mine.pdb&sequence=MK", data))
    assert status == 422 and "has 2 residues, and chain A of mine has 57" in said


def test_what_is_saved_is_what_the_terminal_saves(page):
    exchanges = [Exchange("1cbs_A", "What *is* it?", "<b>", ("3 of 5 residues have no coordinates.",))]
    asked = {"exchanges": [one.to_json() for one in exchanges]}
    assert post(page, "/save", {**asked, "as": "json"})[1].decode() == as_json("runs/x/model", exchanges)
    assert post(page, "/save", {**asked, "as": "markdown"})[1].decode() == as_markdown("runs/x/model", exchanges)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "path", ["/../page.py", "/static/page.js", "/%2e%2e/chat.py", "//etc/passwd", "/%00", "/etc/passwd", "/page.js/"]
)
def test_only_the_fixed_table_of_files_is_served(page, path):
    assert send(page, "GET", path)[0] == 404


def test_foreign_names_and_foreign_pages_are_refused(page):
    """A name bent to this address by its owner's DNS; another page that makes the reader's browser ask."""
    port = page.server_address[1]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "",
        "localhost.evil.example",
        "[::1",
    ):
        assert send(page, "GET", "/about", Host=host)[0] in (400, 403), host
    for host in ("localhost", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST:1"):
        assert send(page, "GET", "/about", Host=host)[0] == 200, host
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}"):
        assert post(page, "/ask", question(), Origin=origin)[0] == 403, origin
    assert post(page, "/ask", question(), Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_an_upload_that_is_too_large_is_refused_before_it_is_read(page):
    status, said = refused(send(page, "POST", "/read?name=x.pdb", b"x" * 3_000_000))
    assert status == 413 and said == "2.9 MB are more than the 0.2 MB taken here"


@pytest.mark.parametrize(
    "path, body, status, says",
    [
        ("/read?name=x.pdb", b"no structure", 422, "x.pdb: neither mmCIF"),
        ("/read?name=..%2F..%2Fetc%2Fpasswd", b"no structure", 422, "passwd: neither mmCIF"),
        ("/read?name=x.pdb.gz", b"\x1f\x8bjunk", 422, "x.pdb.gz: damaged or truncated gzip"),
        ("/read", b"", 422, "no sequence"),
        ("/read?sequence=MK1", b"", 422, "'1' at position 3"),
        ("/read?sequence=" + "A" * 5001, b"", 422, "5001 residues are more than the 5000 allowed"),
        ("/read?sequence=" + "A" * 70_000, b"", 414, "Too Long"),
        ("/ask", b"[]", 400, "no JSON object"),
        ("/ask", b"{" * 90_000, 400, "no JSON object"),
        ("/ask", b"[" * 90_000, 400, "no JSON object"),
        ("/ask", b'{"question": " "}', 400, "the question is empty"),
        ("/ask", b'{"question": "%s"}' % (b"x" * 101), 400, "the question has 101 letters; 100 are the most"),
        ("/ask", b'{"question": "x", "protein": {"id": 1}}', 422, "not a protein"),
        ("/ask", b"x" * 300_001, 413, "more than"),
        ("/save", b'{"exchanges": [{"protein": 1}]}', 400, "not a conversation"),
        ("/nothing", b"", 404, "nothing under this address"),
    ],
)
def test_what_is_wrong_is_said(page, path, body, status, says):
    found = refused(send(page, "POST", path, body))
    assert found[0] == status and says in found[1]


def test_a_request_that_does_not_say_its_length_is_refused(page):
    assert refused(send(page, "POST", "/read?name=x", iter([b"abc"])))[0] == 411
    assert send(page, "PUT", "/about")[0] == 501


def test_a_protein_too_long_for_the_model_is_said_in_the_stream(page):
    told = lines_of(post(page, "/ask", question(subject.protein_of_sequence("A" * 4100)))[1])
    assert "this LLM's context has 4096" in told[-1]["error"]


# --------------------------------------------------------------------------------------------------------------- bounds


def raw(page, text: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", page.server_address[1]), timeout=20)
    connection.sendall(text)
    return connection


def test_a_request_that_trickles_in_is_cut_off(assistant):
    with serving(assistant, replace(BOUNDS, request_seconds=0.5)) as page:
        with raw(page, b"POST /read?name=x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n") as connection:
            with pytest.raises(OSError):
                for _ in range(100):
                    connection.sendall(b"x")
                    time.sleep(0.05)
        assert send(page, "GET", "/about")[0] == 200


def test_connections_beyond_the_bound_are_turned_away_and_the_place_is_given_back(assistant):
    with serving(assistant, replace(BOUNDS, connections=1)) as page:
        with raw(page, b"GET /about HTTP/1.1\r\n"):
            time.sleep(0.1)
            assert send(page, "GET", "/about")[0] == 503
        end = time.monotonic() + 10
        while send(page, "GET", "/about")[0] != 200:
            assert time.monotonic() < end


def test_one_question_at_a_time_and_only_so_many_wait(assistant):
    with serving(assistant, replace(BOUNDS, waiting=1, answer_seconds=1)) as page:
        with assistant.lock:
            busy = []
            thread = threading.Thread(target=lambda: busy.append(post(page, "/ask", question())))
            thread.start()
            end = time.monotonic() + 10
            while page.waiting._value:  # looked at and not taken, or the question would find no place to wait
                assert time.monotonic() < end
                time.sleep(0.01)
            assert refused(post(page, "/ask", question())) == (
                503,
                "too many questions are waiting: try again in a minute",
            )
            thread.join()
        assert "the model was busy for 1 seconds" in lines_of(busy[0][1])[-1]["error"]
        assert "answer" in lines_of(post(page, "/ask", question())[1])[-1]


def test_whoever_goes_away_leaves_the_model_free(page, assistant):
    body = json.dumps(question()).encode()
    for _ in range(3):
        raw(page, b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)).close()
    assert assistant.lock.acquire(timeout=20)
    assistant.lock.release()
    assert "answer" in lines_of(post(page, "/ask", question())[1])[-1]


def test_an_answer_that_is_left_puts_the_model_back_before_the_next_may_begin(assistant):
    """Decoding changes the model's attention for its time; whoever has the lock next must find the usual one."""
    seen = []

    class Lock:
        def acquire(self, timeout):
            return True

        def release(self):
            seen.append(assistant.model.llm.config._attn_implementation)

    server = SimpleNamespace(assistant=replace(assistant, lock=Lock()), bounds=BOUNDS)
    lines = pages.Handler.pieces(SimpleNamespace(server=server), subject.protein_of_sequence("MKTAYIAKQR"), "What?")
    assert next(line for line in lines if "piece" in line)
    assert assistant.model.llm.config._attn_implementation != attention.NAME
    lines.close()
    assert seen == [attention.NAME]


@pytest.mark.parametrize(
    "name, kept", [("a b/../c.pdb", "c.pdb"), ("..", "upload"), ("C:\\x\\ü<1>.cif", "ü_1_.cif"), ("", "upload")]
)
def test_a_name_is_a_name(name, kept):
    assert pages.plain_name(name) == kept
