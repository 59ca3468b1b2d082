"""A local HTTP server that speaks OpenAI's chat-completions protocol, and fails on demand.

It checks each request as the real one does, and answers with question/answer pairs made from the prompt. `faults` are
played one per request, in the order of arrival; None is a good answer. What came in is kept in `requests`.
"""

import email.utils
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Fault:
    """status: an HTTP error with this message. cut: the connection ends, "silent" before any byte, "body" within it.
    content: the model's answer instead of a good one. body: the whole reply. finish: finish_reason."""

    status: int = 200
    message: str = "made to fail"
    headers: dict = field(default_factory=dict)
    cut: str = ""
    content: str | None = None
    body: bytes | None = None
    refusal: str | None = None
    finish: str = "stop"
    usage: dict | None | str = "as usual"
    hang_seconds: float = 0.0


@dataclass
class Seen:
    """One request: its raw body, its JSON, its headers."""

    raw: bytes
    body: dict
    headers: dict

    @property
    def prompt(self) -> str:
        return self.body["messages"][-1]["content"]


def good_content(prompt: str, num_pairs: int = 2) -> str:
    """Pairs about the first word that ends in -in, so that an answer can be traced to its abstract."""
    name = next(iter(re.findall(r"\b\w+in\b", prompt.split("Abstract:")[-1])), "it")
    pairs = [
        {"question": f"What is role {i} of this protein?", "answer": f"Role {i} is that of {name}."}
        for i in range(num_pairs)
    ]
    return json.dumps({"pairs": pairs})


class OpenAIServer:
    """with OpenAIServer() as server: ... server.url ...

    key: refuse other keys with 401, and name the key in the refusal. formats: response_format types that are known;
    others are refused with 400. limit_name: the only name under which the output limit is known, if one is given.
    not_before: {"seconds": s}: after the first 429 refuse whatever comes sooner than s later.
    """

    def __init__(
        self,
        faults: Iterable[Fault | None] = (),
        *,
        key: str | None = None,
        formats: tuple[str, ...] = ("json_schema", "json_object"),
        limit_name: str | None = None,
        usage: tuple[int, int] = (100, 50),
        answer: Callable[[str], str] = good_content,
        always: Fault | None = None,
        patience_seconds: float | None = None,
        delay_seconds: float = 0.0,
    ):
        self.faults, self.always = list(faults), always
        self.key, self.formats, self.limit_name, self.usage, self.answer = key, formats, limit_name, usage, answer
        self.patience_seconds, self.delay_seconds = patience_seconds, delay_seconds
        self.requests: list[Seen] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.first_at: float | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                with server.lock:
                    server.in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server.in_flight)
                try:
                    server.serve(self)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has gone
                finally:
                    with server.lock:
                        server.in_flight -= 1

            do_GET = do_POST

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> "OpenAIServer":
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self.lock:
            refusal = self.check(handler, raw)
            if handler.path == PATH and handler.command == "POST":
                self.requests.append(Seen(raw, json.loads(raw), dict(handler.headers)))
            fault = self.always or (self.faults.pop(0) if self.faults and refusal is None else None)
        if self.delay_seconds:
            time.sleep(self.delay_seconds)
        if refusal is not None:
            return reply(handler, refusal[0], error_body(refusal[1]))
        if self.patience_seconds is not None:
            now = time.monotonic()
            self.first_at = self.first_at or now
            if now - self.first_at < self.patience_seconds:
                return reply(handler, 429, error_body("slow down"), {"Retry-After": str(self.patience_seconds)})
        fault = fault or Fault()
        time.sleep(fault.hang_seconds)
        if fault.cut == "silent":
            return cut(handler)
        if fault.status != 200:
            return reply(handler, fault.status, error_body(fault.message), fault.headers)
        body = self.completion(json.loads(raw), fault) if fault.body is None else fault.body
        if fault.cut == "body":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            return cut(handler)
        return reply(handler, 200, body)

    def check(self, handler: BaseHTTPRequestHandler, raw: bytes) -> tuple[int, str] | None:
        """(status, message) of a refusal, by the protocol's rules."""
        if handler.path != PATH or handler.command != "POST":
            return 404, f"unknown request {handler.command} {handler.path}"
        given = handler.headers.get("Authorization")
        if self.key is not None and given != f"Bearer {self.key}":
            return 401, f"incorrect key provided: {given}"
        if handler.headers.get("Content-Type") != "application/json":
            return 400, "wanted application/json"
        body = json.loads(raw)
        if not isinstance(body.get("model"), str) or not body.get("messages"):
            return 400, "model and messages are required"
        if any(set(m) != {"role", "content"} or m["role"] not in ("system", "user") for m in body["messages"]):
            return 400, "each message has a role and a content"
        known = {"model", "messages", "response_format", "max_tokens", "max_completion_tokens"}
        if set(body) - known:
            return 400, f"unknown parameters {sorted(set(body) - known)}"
        if self.limit_name == "max_completion_tokens" and "max_tokens" in body:
            return 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        wanted = body.get("response_format", {"type": "text"})
        if wanted["type"] not in self.formats:
            return 400, f"response_format {wanted['type']} is not supported"
        if wanted["type"] == "json_schema" and not {"name", "schema", "strict"} <= set(wanted["json_schema"]):
            return 400, "json_schema wants name, strict and schema"
        # OpenAI's own rule for json_object.
        if wanted["type"] == "json_object" and "json" not in str(body["messages"]).lower():
            return 400, "'messages' must contain the word 'json' in some form"
        return None

    def completion(self, request: dict, fault: Fault) -> bytes:
        content = fault.content
        if content is None and fault.refusal is None:
            content = self.answer(request["messages"][-1]["content"])
        prompt_tokens, completion_tokens = self.usage
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        message = {"role": "assistant", "content": content, "refusal": fault.refusal}
        reply = {
            "id": f"chatcmpl-{len(self.requests)}",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": fault.finish, "logprobs": None}],
            "usage": usage if fault.usage == "as usual" else fault.usage,
        }
        return json.dumps(reply).encode()


def error_body(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "error", "param": None, "code": None}}).encode()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(body)


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def http_date(seconds_from_now: float) -> str:
    return email.utils.formatdate(time.time() + seconds_from_now, usegmt=True)
