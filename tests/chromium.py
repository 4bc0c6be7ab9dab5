"""A real headless Chromium for tests, driven through its debugging pipe; nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
)


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. Its errors and what it asked of the network are kept."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 1000) -> None:
        chromium = find_chromium()
        assert chromium is not None
        (read_commands, self._commands), (self._answers, write_answers) = os.pipe(), os.pipe()
        flags = " ".join([*FLAGS, f"--user-data-dir='{profile}'", f"--window-size={width},{height}", "about:blank"])
        shell = f"exec '{chromium}' {flags} 3<&{read_commands} 4>&{write_answers}"  # the pipe is descriptors 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", shell],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._count, self._buffer, self._session = 0, b"", ""
        self.errors: list[str] = []
        self.requested: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def open(self, address: str) -> None:
        self._ask("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self._evaluated(script)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _evaluated(self, script: str) -> dict[str, Any]:
        return self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)

    def wait_for(self, script: str, seconds: float = 30.0) -> Any:
        """The value of an expression as soon as it is true; while a page loads it may still throw."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self._evaluated(script)["result"]
            if value.get("value"):
                return value["value"]
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {script}; errors: {self.errors}")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._answers, 1 << 20)
            assert chunk, "Chromium has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(event["params"]["exceptionDetails"]))
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(event["params"]["request"]["url"])
