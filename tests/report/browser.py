"""Headless Chromium, driven through ChromeDriver's own protocol (W3C WebDriver over HTTP), with nothing but urllib."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--autoplay-policy=no-user-gesture-required", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


class Browser:
    """One tab."""

    def __init__(self, address: str, session: str) -> None:
        self.base = f"{address}/session/{session}"

    def open(self, page: Path) -> None:
        _send(f"{self.base}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a function returns."""
        return _send(f"{self.base}/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 20.0) -> Any:
        """The first value of ``script`` that is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true within {seconds:g} s: {script}")

    def console(self) -> list[str]:
        """What the console has been told since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in _send(f"{self.base}/se/log", {"type": "browser"})]

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return _send(f"{self.base}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Size of the screen in CSS pixels, and whether the reader prefers dark pages."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(_send(f"{self.base}/screenshot")))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, without any network; everything it wrote is removed."""
    assert DRIVER is not None and CHROMIUM is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        address = f"http://127.0.0.1:{port}"
        environment = {**os.environ, "HOME": folder, "XDG_CONFIG_HOME": folder, "XDG_CACHE_HOME": folder}
        driver = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        session = None
        try:
            _ready(address)
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder}/profile"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = _send(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            yield Browser(address, session)
        finally:
            if session is not None:
                with contextlib.suppress(OSError, AssertionError):
                    _send(f"{address}/session/{session}", method="DELETE")
            driver.terminate()
            driver.wait(20)


def _ready(address: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if _send(f"{address}/status")["ready"]:
                return
        time.sleep(0.1)
    raise AssertionError("ChromeDriver does not answer")


def _send(url: str, body: Any = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode(errors='replace')[:2000]}") from None
