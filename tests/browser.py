"""A real browser for tests: headless Chromium, driven over WebDriver by the standard library's HTTP client."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of WebDriver's references to elements."""
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--no-proxy-server",
)  # fmt: skip


def missing() -> str:
    """Why there is no browser to test with; empty if there is one."""
    lacking = [name for name, found in (("Chromium", _chromium()), ("chromedriver", shutil.which("chromedriver"))) if found is None]
    return f"no {' and no '.join(lacking)} on the path; on Debian: apt install chromium chromium-driver" if lacking else ""


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One window; a context manager. ``language``: what pages see as the user's."""

    def __init__(self, language: str = "en-US") -> None:
        self._language = language
        self._stack = contextlib.ExitStack()
        self._session = ""

    def __enter__(self) -> Browser:
        with contextlib.ExitStack() as stack:
            profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            words = [str(shutil.which("chromedriver")), "--port=0"]
            driver = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            stack.callback(_end, driver)
            assert driver.stdout is not None
            port = next(int(found[1]) for line in driver.stdout if (found := re.search(r"started successfully on port (\d+)", line)))
            self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            flags = [*_FLAGS, f"--user-data-dir={profile}", f"--lang={self._language}", f"--accept-lang={self._language}"]
            chrome = {"binary": _chromium(), "args": flags}
            wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
            self._session = f"/session/{self._ask('POST', '/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
            stack.callback(self._ask, "DELETE", self._session)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        self._connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        found = json.loads(response.read())["value"]
        if response.status != 200:
            raise AssertionError(f"{path}: {found['error']}: {found['message']}")
        return found

    def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        self._ask("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns; it sees ``arguments``."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": arguments})

    def text(self, selector: str) -> str:
        """The text that an element has, seen or not."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def _element(self, selector: str) -> str:
        found = self._ask("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        return f"{self._session}/element/{found[_ELEMENT]}"

    def click(self, selector: str) -> None:
        """As a user does: it must be there to be seen, and nothing over it."""
        self._ask("POST", f"{self._element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Keys, to this element; ``\\ue007`` is Enter, ``\\ue008`` Shift, ``\\ue00c`` Escape."""
        self._ask("POST", f"{self._element(selector)}/value", {"text": text})

    def until(self, condition: str | Callable[[], Any], seconds: float = 60.0) -> Any:
        """Wait for a script's result, or a function's, to be true; returns it."""
        ends = time.monotonic() + seconds
        while not (found := self.run(condition) if isinstance(condition, str) else condition()):
            assert time.monotonic() < ends, f"not within {seconds:g} seconds: {condition}; the page says {self.text('body')!r:.3000}"
            time.sleep(0.05)
        return found

    def console(self) -> list[str]:
        """What was written to the console since the last time: errors of scripts, of the network, of the page's policy."""
        return [f"{one['level']} {one['message']}" for one in self._ask("POST", f"{self._session}/se/log", {"type": "browser"})]

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._ask("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def appear(self, *, width: int = 1280, height: int = 860, dark: bool = False, scale: float = 1) -> None:
        """How large the window is, and which colours the user prefers."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)
        value = "dark" if dark else "light"
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))


def _end(driver: subprocess.Popen[str]) -> None:
    driver.terminate()
    try:
        driver.wait(10)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()
    assert driver.stdout is not None
    driver.stdout.close()
