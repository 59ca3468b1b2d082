"""The page of launch/chat.py --web: the standard library's server in front of one model.

It holds no conversation and no upload: a file is read and given back to the browser as a protein, and the browser sends
that along with each question. Only the prefixes of the last few proteins stay in memory (assistant.py). Requests are
bounded in size, number and time; one question is answered at a time, and a few may wait.
Given up: HTTPS, accounts, several models.
"""

import contextlib
import ipaddress
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from urllib.parse import SplitResult, parse_qs, urlsplit

from proteingpt.inference import subject
from proteingpt.inference.assistant import USER_ERRORS, Assistant
from proteingpt.inference.conversation import NOTE, Exchange, as_json, as_markdown
from proteingpt.inference.upload import Limits, read_upload

log = logging.getLogger(__name__)

# Everything that can be fetched: there is no path from a request to the disk.
STATIC = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/3Dmol-min.js": ("3Dmol-min.js", "text/javascript; charset=utf-8"),
    "/3Dmol-LICENSE.txt": ("3Dmol-LICENSE.txt", "text/plain; charset=utf-8"),
}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Bounds:
    """upload: of a structure file. json_bytes: of any other request. waiting: questions that wait for the model, or are
    with it. request_seconds: to send a request; answer_seconds: to wait for the model, and again to answer."""

    upload: Limits = field(default_factory=Limits)
    json_bytes: int = 4 << 20
    question_letters: int = 4000
    exchanges: int = 1000
    connections: int = 32
    uploads: int = 2
    waiting: int = 8
    idle_seconds: int = 30
    request_seconds: int = 300
    answer_seconds: int = 600


class Refused(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class Page(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], assistant: Assistant, model: str, bounds: Bounds = Bounds()):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.assistant, self.model, self.bounds = assistant, model, bounds
        self.connections = threading.BoundedSemaphore(bounds.connections)
        self.uploads = threading.BoundedSemaphore(bounds.uploads)
        self.waiting = threading.BoundedSemaphore(bounds.waiting)
        self.names = {"localhost", address[0].lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        self.static = {
            path: (files("proteingpt.inference").joinpath("static", name).read_bytes(), kind)
            for path, (name, kind) in STATIC.items()
        }
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def process_request(self, request, client_address):
        if not self.connections.acquire(blocking=False):
            request.settimeout(1)
            try:
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            except OSError:
                pass
            return self.shutdown_request(request)
        return super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client that went away
            log.exception("a request failed")

    def knows(self, host: str | None) -> bool:
        """Whether a Host header is one of this machine's names, or an address: no foreign name may be bent to here."""
        name = split(f"//{host or ''}").hostname or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True

    def about(self) -> dict:
        structure, sequence = self.assistant.reads
        upload = self.bounds.upload
        return {
            "model": self.model, "note": NOTE, "reads_structure": structure, "reads_sequence": sequence,
            "upload_bytes": upload.packed_bytes, "residues": upload.residues,
            "question_letters": self.bounds.question_letters,
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request for each connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Page

    def setup(self):
        self.timeout = self.server.bounds.idle_seconds
        super().setup()
        # Against requests that trickle in: idle_seconds alone would begin anew with every byte.
        self.deadline = threading.Timer(self.server.bounds.request_seconds, shut, (self.connection,))
        self.deadline.daemon = True
        self.deadline.start()

    def finish(self):
        self.deadline.cancel()
        super().finish()

    def do_GET(self):
        self.answer({path: lambda path=path: self.send(*self.server.static[path]) for path in STATIC} | {
            "/about": lambda: self.send_json(self.server.about()),
        })  # fmt: skip

    def do_POST(self):
        self.answer({"/read": self.read, "/ask": self.ask, "/save": self.save})

    def answer(self, table):
        self.close_connection = True
        try:
            if not self.server.knows(self.headers.get("Host")):
                raise Refused(
                    HTTPStatus.FORBIDDEN, "this page is served under another name: open the address it printed"
                )
            origin = self.headers.get("Origin")
            if origin is not None and split(origin).netloc != self.headers.get("Host"):
                raise Refused(HTTPStatus.FORBIDDEN, "other pages may not send requests here")
            found = table.get(split(self.path).path)
            if found is None:
                raise Refused(HTTPStatus.NOT_FOUND, "there is nothing under this address")
            found()
        except Refused as error:
            self.send_json({"error": str(error)}, error.status)
            self.drain()
        except USER_ERRORS as error:
            self.send_json({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)

    def read(self):
        """A structure file (the body), a sequence (in the query), or both, to a protein."""
        query = {name: values[0] for name, values in parse_qs(split(self.path).query).items()}
        bounds = self.server.bounds.upload
        if not self.server.uploads.acquire(timeout=bounds.seconds):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "other files are being read: try again in a minute")
        try:
            body = self.body(bounds.packed_bytes)
            if body:
                name = plain_name(query.get("name", "upload"))
                found = read_upload(body, name, query.get("chain") or None, bounds)
            else:
                pasted = subject.protein_of_sequence(query.get("sequence", ""))
                found = {"protein": subject.to_json(pasted), "chains": [], "pdb": None}
        finally:
            self.server.uploads.release()
        protein, notes = subject.from_json(found["protein"], bounds.residues), []
        if body and query.get("sequence"):
            given = subject.with_sequence(protein, query["sequence"])
            protein, notes = given, subject.differences(protein, given)
            found["protein"] = subject.to_json(given)
        unresolved = [i for i, there in enumerate(protein.resolved.tolist()) if not there]
        more = {"unresolved": unresolved, "predicted": protein.confidence is not None}
        name = subject.name_of(protein) + (subject.WITH_SEQUENCE if body and query.get("sequence") else "")
        told = {"name": name, "summary": subject.summary(protein), **more}
        self.send_json({**found, **told, "missing": [*notes, *self.server.assistant.missing(protein)]})

    def ask(self):
        """Lines of JSON as they come: pieces of the answer, then the whole of it, or an error."""
        values = self.json_body()
        question = values.get("question")
        if not isinstance(question, str) or not question.strip():
            raise Refused(HTTPStatus.BAD_REQUEST, "the question is empty")
        if len(question) > self.server.bounds.question_letters:
            longest = self.server.bounds.question_letters
            raise Refused(HTTPStatus.BAD_REQUEST, f"the question has {len(question)} letters; {longest} are the most")
        protein = subject.from_json(values.get("protein"), self.server.bounds.upload.residues)
        if not self.server.waiting.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many questions are waiting: try again in a minute")
        try:
            self.stream(self.pieces(protein, question))
        finally:
            self.server.waiting.release()

    def pieces(self, protein, question: str) -> Iterator[dict]:
        assistant, seconds = self.server.assistant, self.server.bounds.answer_seconds
        if not assistant.lock.acquire(timeout=seconds):
            yield {"error": f"the model was busy for {seconds} seconds: try again"}
            return
        try:
            yield {"missing": assistant.missing(protein)}
            end, answer = time.monotonic() + seconds, ""
            # Closed while the lock is held: decoding puts the model back as it was, which the next answer must not
            # meet.
            with contextlib.closing(assistant.stream(protein, question)) as stream:
                for piece in stream:
                    answer += piece
                    yield {"piece": piece}
                    if time.monotonic() > end:
                        yield {"error": f"stopped after {seconds} seconds"}
                        return
            yield {"answer": answer}
        except USER_ERRORS as error:
            yield {"error": str(error)}
        except RuntimeError as error:  # out of memory, most often
            log.exception("a question failed")
            yield {"error": f"the model failed: {str(error).splitlines()[0]}"}
        finally:
            assistant.lock.release()

    def stream(self, lines: Iterator[dict]):
        """Whoever goes away ends the answer: the next write fails, and the generator is closed."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/x-ndjson; charset=utf-8")
        self.end_headers()
        try:
            for line in lines:
                self.wfile.write(json.dumps(line).encode() + b"\n")
        finally:
            lines.close()

    def save(self):
        values = self.json_body()
        exchanges = exchanges_of(values.get("exchanges"), self.server.bounds)
        if values.get("as") == "json":
            return self.send(as_json(self.server.model, exchanges).encode(), "application/json")
        return self.send(as_markdown(self.server.model, exchanges).encode(), "text/markdown; charset=utf-8")

    # ------------------------------------------------------------------------------------------------------- in and out

    def body(self, max_bytes: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal() and len(length) < 16):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request does not say how long it is")
        if int(length) > max_bytes:
            found, most = (f"{n / 2**20:.1f} MB" for n in (int(length), max_bytes))
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{found} are more than the {most} taken here")
        body = self.rfile.read(int(length))
        self.deadline.cancel()
        if len(body) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, "the request is shorter than it says")
        return body

    def json_body(self) -> dict:
        try:
            values = json.loads(self.body(self.server.bounds.json_bytes))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "the request is no JSON object")
        return values

    def drain(self):
        """Read on a little, so that a refused upload's sender gets to read why."""
        end = time.monotonic() + self.server.bounds.idle_seconds
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < end and self.connection.recv(BLOCK_BYTES):
                pass
        except OSError:
            pass

    def send_json(self, values: dict, status: HTTPStatus = HTTPStatus.OK):
        self.send(json.dumps(values).encode(), "application/json", status)

    def send(self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def end_headers(self):
        for name, value in SECURITY_HEADERS.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        super().end_headers()

    def send_error(self, code, message=None, explain=None):
        self.close_connection = True
        self.send_json({"error": message or HTTPStatus(code).phrase}, HTTPStatus(code))

    def version_string(self) -> str:
        return "proteingpt"

    def log_message(self, format, *args):
        log.debug(format, *args)


def split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "this address, or the name of the page, cannot be read") from None


def shut(connection: socket.socket):
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def plain_name(name: str) -> str:
    """Of an uploaded file, for messages and as an id: its last part, of harmless characters. It is never opened."""
    kept = "".join(c if c.isalnum() or c in "._-+" else "_" for c in name.replace("\\", "/").rpartition("/")[2][:100])
    return kept.lstrip(".") or "upload"


def exchanges_of(values: object, bounds: Bounds) -> list[Exchange]:
    """What a browser asks to have written. Raises Refused."""
    wrong = Refused(HTTPStatus.BAD_REQUEST, "not a conversation: wanted protein, question, answer and missing as text")
    if (
        not isinstance(values, list)
        or len(values) > bounds.exchanges
        or not all(isinstance(one, dict) for one in values)
    ):
        raise wrong
    found = []
    for one in values:
        notes = one.get("missing", [])
        texts = [one.get(name) for name in ("protein", "question", "answer")]
        if not isinstance(notes, list) or not all(isinstance(text, str) for text in (*texts, *notes)):
            raise wrong
        found.append(Exchange(*texts, tuple(notes)))
    return found


def serve(assistant: Assistant, model: str, host: str, port: int) -> int:
    """Until Ctrl-C."""
    try:
        page = Page((host, port), assistant, model)
    except OSError as error:
        why = f"{error.strerror or error}; choose another --host or --port"
        print(f"error: no page at {host}:{port}: {why}", file=sys.stderr)
        return 1
    print(f"page: {page.url}", flush=True)
    if host not in ("127.0.0.1", "::1", "localhost"):
        print("Whoever reaches this address can ask: there is no password.", flush=True)
    with page:
        try:
            page.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
