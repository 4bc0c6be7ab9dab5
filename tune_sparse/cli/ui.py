"""ui: MLflow on the tracked results, opened in the user's browser where there is one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
import webbrowser
from typing import Any

from tune_sparse.cli.command import add_command, add_results_dir, existing_folders
from tune_sparse.cli.words import paragraph, words

PATIENCE_SECONDS = 60.0


def declare(commands: Any) -> None:
    ui = add_command(
        commands,
        "ui",
        _ui,
        "serve the web pages of MLflow for a results folder until Ctrl-C, and open them in a browser if there is one",
        examples=("ui", "ui --results-dir ./gpu-results --port 5001"),
        ok="the server ended by itself",
        fault="the server could not start, or was ended with Ctrl-C",
        notes=[
            words("MLflow", "results folder"),
            paragraph(
                "It shows the file mlflow.db in the results folder. If another store was named to `tune-sparse sweep` "
                "or `tune-sparse track`, by --tracking-uri or the variable MLFLOW_TRACKING_URI, open the address of "
                "that store instead."
            ),
        ],
    )
    add_results_dir(ui)
    ui.add_argument("--port", type=int, default=5000, metavar="N", help="port of the server (default: 5000)")


def _ui(chosen: argparse.Namespace) -> int:
    from tune_sparse.tracking.baselines import comparison_page
    from tune_sparse.tracking.sync import default_uri

    [folder] = existing_folders([chosen.results_dir])
    page, address = comparison_page(default_uri(folder)), f"http://127.0.0.1:{chosen.port}"
    print(f"MLflow on {folder}: {address} (Ctrl-C ends it)", flush=True)
    if page:
        print(f"our best {page.ours} runs beside {page.published} published: {address}/{page.address}", flush=True)
    if page and not page.published:
        print("`tune-sparse track --baselines` imports published numbers to stand beside them", flush=True)
    server = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--backend-store-uri",
        default_uri(folder),
    ]
    with subprocess.Popen([*server, "--port", str(chosen.port)]) as process:
        try:
            if has_desktop():
                open_when_served(f"{address}/{page.address if page else ''}", address, process)
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            raise


def has_desktop() -> bool:
    """True in an interactive desktop session: there is a screen, and a terminal to have typed in."""
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
