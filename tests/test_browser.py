"""In a real Chromium: the page of a report filters and draws, and MLflow shows published numbers beside our runs."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, find_chromium
from sound import sound_ledger

from analysis.baselines.published import as_runs, load_published
from analysis.report.report import write_report
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.tracking.baselines import comparison_page, track_published
from tune_sparse.tracking.sync import default_uri, track_ledger

pytestmark = [
    pytest.mark.xdist_group("machine"),
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium on this machine (Debian: apt install chromium)"),
]
SHOWN = "document.getElementById('shown').textContent"


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    return sound_ledger(tmp_path_factory.mktemp("browser") / "results")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(ledger: Ledger, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> Browser:
    path = ledger.folder / "analysis" / "report.html"
    if not path.exists():
        monkeypatch.setattr("analysis.report.presentation.FIGURES", {})  # tests/test_figures.py draws them
        write_report([ledger.folder])
    browser.errors.clear()
    browser.requested.clear()
    browser.open("about:blank")
    browser.open(path.as_uri())
    browser.wait_for("document.documentElement.dataset.ready === 'yes'")
    return browser


def test_the_page_draws_without_an_error_and_without_the_network(page: Browser) -> None:
    assert page.run("document.querySelectorAll('#plot circle').length") == 12
    assert page.run("document.querySelectorAll('.heat td a').length") == 12
    assert page.run("document.querySelectorAll('#table tbody tr.cell').length") == 12
    assert page.errors == []
    assert [address for address in page.requested if not address.startswith(("file:", "data:", "about:"))] == []


def test_a_filter_leaves_its_cells(page: Browser) -> None:
    choose = (
        "(() => { const s = document.querySelector('#filters [name=method]'); s.value = 'random';"
        " s.dispatchEvent(new Event('change')); return document.querySelectorAll('#table tbody tr.cell').length; })()"
    )
    assert page.run(choose) == 6
    assert page.run(SHOWN).startswith("6 of 12 cells")
    type_in = (
        "(() => { const s = document.querySelector('#filters [name=least]'); s.value = '0.5';"
        " s.dispatchEvent(new Event('input')); return document.querySelectorAll('#table tbody tr.cell').length; })()"
    )
    assert page.run(type_in) == 2
    page.run("document.getElementById('clear').click()")
    assert page.run(SHOWN).startswith("12 of 12 cells")


def test_a_heading_sorts(page: Browser) -> None:
    values = "[...document.querySelectorAll('#table td.sparsity')].map((cell) => cell.textContent)"
    head = "[...document.querySelectorAll('#table th')].find((th) => th.textContent === 'sparsity').click()"
    page.run(head)
    assert page.run(values) == ["0"] * 4 + ["0.3"] * 4 + ["0.6"] * 4
    page.run(head)
    assert page.run(values) == ["0.6"] * 4 + ["0.3"] * 4 + ["0"] * 4


def test_a_hidden_curve_is_not_drawn(page: Browser) -> None:
    assert page.run("document.querySelectorAll('#legend button').length") == 4
    page.run("document.querySelector('#legend button').click()")
    assert page.run("document.querySelectorAll('#plot circle').length") == 9


@pytest.mark.parametrize("link", ["#findings a.trace", "#plot a", ".heat td:last-child a", "#findings table a.trace"])
def test_a_number_leads_to_its_record_in_two_clicks(link: str, page: Browser) -> None:
    click = (
        f"document.querySelector({link!r}).dispatchEvent(new MouseEvent('click', {{bubbles: true, cancelable: true}}))"
    )
    page.run(click)
    page.wait_for(f"{SHOWN}.includes('those behind the number')")
    address = page.run("document.querySelector('#table tbody tr.cell a').href")
    record = Path(address.removeprefix("file://"))
    assert record.name == "result.json"
    assert record.is_file()


def test_a_row_opens_its_whole_record(page: Browser) -> None:
    page.run("document.querySelector('#table tbody tr.cell').click()")
    assert "actual sparsity" in page.run("document.querySelector('#table tr.detail').textContent")
    page.run("document.querySelector('#table tbody tr.cell').click()")
    assert page.run("document.querySelector('#table tr.detail')") is None


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_mlflow_shows_phoenix_and_sqft_beside_our_runs(ledger: Ledger, tmp_path: Path) -> None:
    """In a window that is wide enough: MLflow draws only the columns that are seen."""
    uri, port = default_uri(ledger.folder), free_port()
    track_ledger(ledger, uri)
    chosen = [run for run in as_runs(load_published()) if "Phoenix" in run.name or "SQFT" in run.name]
    track_published(chosen, uri)
    page = comparison_page(uri)
    assert page is not None
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    serving = subprocess.Popen([*server, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Browser(tmp_path, width=4000) as browser, serving as process:
        try:
            for _ in range(240):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                browser.wait_for("new Promise((done) => setTimeout(() => done(true), 250))")
            browser.open(f"http://127.0.0.1:{port}/{page.address}")
            text = browser.wait_for("document.body.innerText.includes('0.501') && document.body.innerText", 120)
        finally:
            process.terminate()
    assert f"Comparing {page.ours + page.published} Runs from 2 Experiments" in text
    for name in ("torch_tiny_boolq", "PUBLISHED (digitised)", "Phoenix", "PUBLISHED (restated) SQFT + SparsePEFT"):
        assert name in text, name
    for metric in ("accuracy", "inference_flops_2048"):
        assert metric in text
