"""Real headless Chromium over the DevTools protocol: what a page logs, asks for and looks like."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-allow-origins=*",
    "--remote-debugging-port=0",
]  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PAPER = 718
"""A4 less Chromium's own margins, in CSS pixels."""

OVERFLOWING = """
[...document.querySelectorAll('main *')].filter(each =>
  each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.scroll') && !each.closest('svg')
).map(each => each.outerHTML.slice(0, 100))
"""
UNDRAWN = """
[...document.querySelectorAll('svg[role=img]')].filter(svg => {
  const marks = svg.querySelectorAll('.mark, polyline, .dot, .bar, .heat');
  const drawn = [...marks].some(mark => { const box = mark.getBBox(); return box.width + box.height > 0; });
  return !drawn || /NaN|undefined|Infinity/.test(svg.outerHTML) || !svg.querySelector('title').textContent
    || !svg.querySelector('desc').textContent || svg.getBoundingClientRect().width < 200;
}).map(svg => svg.outerHTML.slice(0, 200))
"""


class Page:
    """One tab. `errors` and `requests` are what it logged and asked for since it was opened."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command, and its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, found = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(found["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(found["args"])[:500])
        elif method == "Log.entryAdded":
            self.errors.append(found["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {found['message']}")

    def open(self, file: Path) -> None:
        """Load a file and wait until it is complete."""
        self.errors, self.requests = [], []
        self.send("Page.navigate", url=file.resolve().as_uri())
        deadline = time.monotonic() + 30
        while self.run("document.readyState") != "complete":
            assert time.monotonic() < deadline, "the page did not load"
            time.sleep(0.05)

    def show(self, width: int, *, dark: bool = False, paper: bool = False) -> None:
        """As on a screen of `width` pixels, in light or dark, or on paper."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=[scheme])

    def run(self, script: str) -> Any:
        """The value of a script in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, file: Path) -> None:
        """A PNG of the whole page."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """The page on paper."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"])


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a browser with a profile of its own."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = Path(profile, "DevToolsActivePort")
            deadline = time.monotonic() + 60
            while not port.exists() or not port.read_text().strip():
                assert process.poll() is None, "Chromium did not start"
                assert time.monotonic() < deadline, "Chromium did not start"
                time.sleep(0.1)
            address = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30) as answer:
                (tab,) = [tab for tab in json.load(answer) if tab["type"] == "page"]
            socket = create_connection(tab["webSocketDebuggerUrl"], timeout=60, http_no_proxy=["127.0.0.1"])
            yield Page(socket)
            socket.close()
        finally:
            process.terminate()
            process.wait(timeout=30)


def check(page: Page, file: Path) -> None:
    """Opened, silent, whole, and without overflow at every width and in both schemes."""
    page.open(file)
    for width in (360, 1400):
        for dark in (False, True):
            page.show(width, dark=dark)
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run(OVERFLOWING) == []
            assert page.run(UNDRAWN) == []
            background = page.run("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") != dark
    page.show(PAPER, paper=True)
    assert page.run("[...document.querySelectorAll('table')].map(each => each.scrollWidth)"
                    f".filter(width => width > {PAPER})") == [], "nobody can scroll on paper"  # fmt: skip
    assert page.run("document.querySelectorAll('svg[role=img]').length") >= 3
    assert page.run("[...document.images].filter(each => !each.naturalWidth).length") == 0
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith("data:")] == [file.resolve().as_uri()]
    assert page.pdf().startswith(b"%PDF")
