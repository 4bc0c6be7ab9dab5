"""A page is opened only where somebody sits, and only once a server answers."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading

import pytest

from tune_sparse.cli import ui


@pytest.mark.parametrize(
    ("variables", "terminal", "expected"),
    [
        ({"DISPLAY": ":0"}, True, True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, True, True),
        ({}, True, False),
        ({"DISPLAY": ":0"}, False, False),
        ({"DISPLAY": ":0", "SSH_CONNECTION": "a b"}, True, False),
    ],
)
def test_a_desktop_has_a_screen_and_a_terminal(
    variables: dict[str, str], terminal: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert ui.has_desktop() is expected


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", pages.append)
    return pages


def test_the_page_is_opened_when_the_server_answers(opened: list[str]) -> None:
    with (
        http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
    ):
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        ui.open_when_served("a page", f"http://127.0.0.1:{server.server_port}", process)
        answering.join()
        process.kill()
    assert opened == ["a page"]


def test_nothing_is_opened_when_the_server_has_ended(opened: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        ui.open_when_served("a page", "http://127.0.0.1:9", process)
    assert opened == []
