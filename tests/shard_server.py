"""A real HTTP server on loopback that serves a directory, counts what is asked for, and can fail or stall on order."""

import contextlib
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Orders:
    """asked: how often each name was. failing: {name: how many of its next requests get status 503}. cut: names whose
    next body ends in the middle. stalled: names whose body never comes beyond its first half until `released` is
    set."""

    def __init__(self):
        self.asked = Counter()
        self.failing, self.cut, self.stalled = {}, set(), set()
        self.released = threading.Event()
        self.seconds_each = 0.0


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, orders: Orders, *args, **kwargs):
        self.orders = orders
        super().__init__(*args, **kwargs)

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.orders.asked[name] += 1
        time.sleep(self.orders.seconds_each)
        if self.orders.failing.get(name, 0):
            self.orders.failing[name] -= 1
            return self.send_error(503)
        if name in self.orders.cut | self.orders.stalled:
            return self.half(name)
        return super().do_GET()

    def half(self, name: str):
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if name in self.orders.stalled:
            self.orders.released.wait()
        self.orders.cut.discard(name)
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(directory: Path):
    """(address, orders) of the directory over HTTP."""
    orders = Orders()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, orders, directory=str(directory)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", orders
    finally:
        orders.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
