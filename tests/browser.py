"""A real headless browser, driven by chromedriver over W3C WebDriver's HTTP; nothing of it is left behind."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
ABSENT = (
    None if CHROMIUM and DRIVER else "no chromium and chromedriver here: apt-get install -y chromium chromium-driver"
)
# As root, without a network, and drawing WebGL on the processor.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--proxy-server=direct://",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in WebDriver's JSON


class Browser:
    def __init__(self, address: str):
        self.address = address

    def call(self, method: str, path: str, values: dict | None = None):
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, url: str):
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments):
        """The value that the body of a function returns, in the page; a promise is waited for."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> str:
        return self.call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str):
        self.call("POST", f"/element/{self.element(selector)}/click", {})

    def type(self, selector: str, text: str):
        """Keys; into a file input the path of a file."""
        self.call("POST", f"/element/{self.element(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def wait(self, script: str, *arguments, seconds: float = 30):
        """Until the script gives something true, which is returned."""
        end = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def size(self, width: int, height: int):
        self.call("POST", "/goog/cdp/execute", {
            "cmd": "Emulation.setDeviceMetricsOverride",
            "params": {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        })  # fmt: skip

    def dark(self, dark: bool):
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}})

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("GET", "/screenshot"))

    def complaints(self) -> list[str]:
        """What the page's console has of errors, refusals of the content policy among them."""
        return [
            entry["message"]
            for entry in self.call("POST", "/se/log", {"type": "browser"})
            if entry["level"] == "SEVERE"
        ]


@contextlib.contextmanager
def browser(directory: Path):
    """directory: takes the browser's profile, and what is downloaded."""
    # a short path: sockets are made in it
    scratch = tempfile.TemporaryDirectory(prefix="web", ignore_cleanup_errors=True)
    process = subprocess.Popen(
        [DRIVER, "--port=0"], env={**os.environ, "TMPDIR": scratch.name}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    session = None
    try:
        port = next(
            found[1] for line in process.stdout if (found := re.search(r"started successfully on port (\d+)", line))
        )
        root = Browser(f"http://127.0.0.1:{port}")
        chrome = {
            "binary": CHROMIUM, "args": [*OPTIONS, f"--user-data-dir={directory / 'profile'}"],
            "prefs": {"download.default_directory": str(directory), "download.prompt_for_download": False},
        }  # fmt: skip
        wanted = {
            "goog:chromeOptions": chrome,
            "goog:loggingPrefs": {"browser": "ALL"},
            "unhandledPromptBehavior": "accept",
        }
        found = root.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        session = Browser(f"{root.address}/session/{found['sessionId']}")
        yield session
    finally:
        try:
            if session:
                session.call("DELETE", "")
        finally:
            process.terminate()
            process.wait(10)
            process.stdout.close()
            scratch.cleanup()
