"""A real headless Chromium, driven over the DevTools protocol through two pipes: no driver, no socket, no further package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --hide-scrollbars --disable-dev-shm-usage --remote-debugging-pipe --window-size=1280,900"
).split()
_LOCAL = ("file:", "data:", "blob:", "about:")
_KEYS = {"ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Escape": 27, "Tab": 9}


class Browser:
    """One Chromium process; `open` gives a fresh tab."""

    def __init__(self, profile: str) -> None:
        assert CHROMIUM is not None
        read_commands, self._to_browser = os.pipe()
        self._from_browser, write_events = os.pipe()

        # Chromium reads commands from descriptor 3 and writes events to 4. A small program in between moves the pipes there (through high
        # numbers, since one of them may be 3 or 4 already) and then becomes Chromium.
        move = "import os, sys; os.dup2({0}, 63); os.dup2({1}, 64); os.dup2(63, 3); os.dup2(64, 4); os.execv(sys.argv[1], sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", move.format(read_commands, write_events), CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(read_commands, write_events),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_events)
        self._buffer = b""
        self._messages: deque[dict[str, Any]] = deque()
        self._last = 0

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One protocol command; events that arrive in the meantime are kept for `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        kept: list[dict[str, Any]] = []
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                self._messages.extendleft(reversed(kept))
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            kept.append(answer)

    def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.popleft()
        while b"\0" not in self._buffer:
            chunk = os.read(self._from_browser, 1 << 16)
            if not chunk:
                raise RuntimeError("chromium ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    def events(self) -> list[dict[str, Any]]:
        """Events received so far, oldest first; they are handed out once."""
        events, self._messages = list(self._messages), deque()
        return events

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False, settle: bool = True) -> Tab:
        """A tab of that size with the file loaded and, with `settle`, every picture on it mounted."""
        return Tab(self, path, width, height, dark, settle)

    def close(self) -> None:
        """End the process that this object started."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        os.close(self._to_browser)
        os.close(self._from_browser)


class Tab:
    """One page. `problems` collects console errors, uncaught exceptions and every request that is not of the page itself."""

    def __init__(self, browser: Browser, path: Path, width: int, height: int, dark: bool, settle: bool) -> None:
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        self._problems: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = "dark" if dark else "light"
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=path.resolve().as_uri())
        self._loaded(settle)

    def _loaded(self, settle: bool) -> None:
        self.wait("document.readyState === 'complete'")
        if settle:  # a picture with a script mounts when the script has been inflated
            self.wait(
                "[...document.querySelectorAll('.lr-view')].every((v) => v.dataset.lrReady || !v.nextElementSibling?.matches('script'))"
            )
        self.wait("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def reload(self) -> None:
        """Load the page anew. The old page still answers for a while: a mark on it tells the two apart."""
        self.run("window.lrOldPage = true")
        self._call("Page.reload")
        self.wait("window.lrOldPage !== true && document.querySelector('.lr-view') !== null")
        self._loaded(settle=True)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression (awaited if it is a promise)."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 20.0) -> None:
        """Until a JavaScript condition holds."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise AssertionError(f"not within {seconds} s: {condition}; {self.problems()}")
            time.sleep(0.03)

    def fits(self, width: int) -> None:
        """Nothing sticks out sideways once the pictures have their final size: on a loaded machine some frames after mounting."""
        self.wait(f"document.documentElement.scrollWidth <= {width}")

    def problems(self) -> list[str]:
        """What went wrong on the page so far: errors on the console, exceptions, requests to anything but itself."""
        for event in self._browser.events():
            if event.get("sessionId") != self._session:
                continue
            params, method = event.get("params", {}), event.get("method")
            if method == "Runtime.exceptionThrown":
                self._problems.append(str(params["exceptionDetails"].get("exception", params)))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                self._problems.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                self._problems.append(str(params["entry"]))
            elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(_LOCAL):
                self._problems.append(f"request: {params['request']['url']}")
            elif method == "Page.javascriptDialogOpening":
                self._problems.append(f"dialog: {params['message']}")
        return self._problems

    def _point(self, selector: str) -> tuple[float, float]:
        script = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', inline: 'center'}}); "
            "const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        x, y = self.run(script)
        return float(x), float(y)

    def hover(self, selector: str) -> None:
        """Move the pointer onto the element."""
        self.move(*self._point(selector))

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def click(self, selector: str) -> None:
        """Press and release the left button on the element."""
        x, y = self._point(selector)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def wheel(self, x: float, y: float, delta: float) -> None:
        """Turn the mouse wheel at a place; negative is away from the person."""
        self._call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the left button at one place, move to another in steps, and let go."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=start[0], y=start[1])
        self._call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], button="left", clickCount=1)
        for step in range(1, 5):
            x, y = (a + (b - a) * step / 4 for a, b in zip(start, end, strict=True))
            self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
        self._call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], button="left", clickCount=1)
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def press(self, key: str) -> None:
        """Press a named key (`Enter`, `ArrowUp`, ...) on the focused element."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]} | ({"text": "\r"} if key == "Enter" else {})
        self._call("Input.dispatchKeyEvent", type="keyDown", **code)
        self._call("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        """Type into the focused element."""
        self._call("Input.insertText", text=text)

    def set_slider(self, selector: str, value: float) -> None:
        """Move a range input, as dragging it does."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {value}; "
            "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def allow_downloads(self, folder: Path) -> None:
        """Let the page save files to `folder`."""
        self._browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def print_media(self) -> None:
        """Style the page as for print."""
        self._call("Emulation.setEmulatedMedia", media="print")

    def screenshot(self, path: Path, full: bool = True) -> Path:
        """PNG of the page as a person sees it."""
        data = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)


@contextmanager
def headless_chromium() -> Iterator[Browser]:
    """A fresh Chromium, ended afterwards; the test is skipped where there is none. For a fixture of module scope."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: pages are not opened in a real browser")
    profile = tempfile.mkdtemp(prefix="lens_relevance_chromium_")
    started = Browser(profile)
    try:
        yield started
    finally:
        started.close()
        shutil.rmtree(profile, ignore_errors=True)
