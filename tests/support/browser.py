"""Headless Chromium by the WebDriver protocol, with the standard library: chromedriver speaks JSON over HTTP on loopback.

Protocol: W3C WebDriver (Recommendation); commands of the developer tools go through chromedriver's own `goog/cdp/execute`.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

from support.live import PATIENCE, Unavailable

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-dev-shm-usage", "--disable-component-update", "--disable-sync", "--disable-default-apps", "--force-device-scale-factor=1")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""Name of an element reference in WebDriver's JSON."""

KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Home": "\ue011", "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015"}
"""WebDriver, Keyboard Actions: keys without a character."""


class Browser:
    """One browser with one page.  Use as a context manager."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
        if driver is None or chromium is None:
            raise Unavailable("chromium and chromedriver (Debian: chromium, chromium-driver) are not installed")
        self._profile = tempfile.mkdtemp(prefix="vtdbg-chromium-")
        self._driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            self._http = http.client.HTTPConnection("127.0.0.1", self._port(), timeout=PATIENCE)
            options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={self._profile}", f"--window-size={width},{height}"]}
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": {
                "browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}}})
            self._session = f"/session/{made['sessionId']}"
        except (OSError, RuntimeError, ValueError) as error:
            self._end()
            raise Unavailable(f"chromedriver does not start a browser: {error}") from error

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            found = re.search(r"started successfully on port (\d+)", line)
            if found:
                return int(found.group(1))
        raise RuntimeError("it ended without a port")

    def _end(self) -> None:
        self._driver.terminate()
        self._driver.wait(timeout=PATIENCE)
        if self._driver.stdout is not None:
            self._driver.stdout.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", self._session)
        finally:
            self._http.close()
            self._end()

    def _call(self, method: str, path: str, body: Optional[Dict[str, Any]] = None) -> Any:
        self._http.request(method, path, json.dumps(body) if body is not None else None, {"Content-Type": "application/json"})
        value = json.loads(self._http.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value

    # ---- what tests ask for ----

    def open(self, path: Path) -> None:
        self._call("POST", self._session + "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a function returns."""
        return self._call("POST", self._session + "/execute/sync", {"script": script, "args": list(arguments)})

    def tools(self, command: str, **parameters: Any) -> Any:
        """A command of the developer tools protocol."""
        return self._call("POST", self._session + "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def press(self, *keys: str) -> None:
        """Real key events to what has the focus: names of KEYS, or characters."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", self._session + "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def mouse(self, x: float, y: float, clicks: int = 0) -> None:
        """The pointer to a place of the window, and clicks there, of which each is the next one of the same: two are a double click however long
        they take."""
        events = [("mouseMoved", 0), *((kind, count) for count in range(1, clicks + 1) for kind in ("mousePressed", "mouseReleased"))]
        for kind, count in events:
            self.tools("Input.dispatchMouseEvent", type=kind, x=int(x), y=int(y), button="left" if count else "none", clickCount=count)

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", self._session + "/screenshot"))

    def pdf(self) -> bytes:
        return base64.b64decode(self.tools("Page.printToPDF", printBackground=False)["data"])

    def emulate(self, media: str = "screen", scheme: str = "light") -> None:
        self.tools("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def console(self) -> List[str]:
        """Messages of the console since the last call: errors, warnings, what the content security policy refused."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._call("POST", self._session + "/se/log", {"type": "browser"})]

    def requests(self) -> List[str]:
        """Addresses that the page asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._call("POST", self._session + "/se/log", {"type": "performance"})]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
