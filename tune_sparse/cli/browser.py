"""A page opened in the user's browser, where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
import webbrowser

PATIENCE_SECONDS = 60.0


def has_desktop() -> bool:
    """Whether somebody sits before this machine: a screen, and a terminal to have typed in."""
    screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(screen) and sys.stdout.isatty() and "SSH_CONNECTION" not in os.environ


def open_when_served(page: str, server: str, process: subprocess.Popen[bytes]) -> None:
    """Open `page` as soon as `server` answers; nothing if its process ends, or does not answer in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(server, timeout=2).close()
        except OSError:
            time.sleep(0.3)
            continue
        webbrowser.open(page)
        return
