"""The HTML page: every number of it leads to runs, and runs to their files; nothing of it is markup by accident."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import failed_record, make_run, make_sweep
from sound import make_cells, sound_ledger

from analysis.report.bundle import PROGRAM, citation, write_bundle
from analysis.report.page import render_claim
from analysis.report.report import write_report
from analysis.stats.claims import Claim, number
from tune_sparse.cli import main
from tune_sparse.errors import InputError
from tune_sparse.ledger.ledger import Ledger

LIMIT_BYTES = 10 * 2**20


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Twelve cells, ten runs, with a report."""
    ledger = sound_ledger(tmp_path_factory.mktemp("report") / "results")
    assert write_report([ledger.folder]).errors == 0
    return ledger


@pytest.fixture(scope="module")
def page(ledger: Ledger) -> str:
    return (ledger.folder / "analysis" / "report.html").read_text("utf-8")


def read_data(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def test_the_page_needs_no_network_and_is_small(page: str) -> None:
    loaded = re.findall(r'(?:src|href)="([^"]*)"', re.sub(r"<a\b[^>]*>", "", page))
    assert loaded
    assert [address for address in loaded if not address.startswith("data:")] == []
    assert "@import" not in page
    assert len(page.encode()) < LIMIT_BYTES


def test_the_audit_comes_first_and_then_the_findings(page: str) -> None:
    places = [page.index(text) for text in ('id="audit"', "no error", 'id="findings"', "RQ1", 'id="curves"')]
    assert places == sorted(places)


def test_captions_name_the_spread_the_metric_and_the_shared_learning_rate(page: str) -> None:
    assert page.count("All at one shared learning rate.") == 2
    assert page.count("standard error over examples (one seed)") == 2
    assert re.search(r"Primary metrics: acc\w* of boolq\.", page)
    assert "no test stands behind it" in page


def test_every_trace_leads_to_cells(page: str) -> None:
    data = read_data(page)
    used = {int(n) for n in re.findall(r'href="#trace=(\d+)"', page)}
    assert used == set(range(len(data["traces"])))
    assert all(trace and max(trace) < data["count"] for trace in data["traces"])


def test_every_number_of_a_finding_is_a_link(page: str, ledger: Ledger) -> None:
    claims = json.loads((ledger.folder / "analysis" / "findings.json").read_text())
    shown = [n["shown"] for c in claims for name, n in c["numbers"].items() if f"{{{name}}}" in c["template"]]
    linked = re.findall(r'class="trace" href="#trace=\d+">([^<]+)</a>', page)
    assert len(shown) > 10
    for text in set(shown):
        assert linked.count(text.replace("<", "&lt;")) >= shown.count(text)


def test_every_cell_has_a_record_where_its_link_leads(page: str, ledger: Ledger) -> None:
    data = read_data(page)
    columns = data["columns"]
    names = columns["cell_id"]["words"]
    for place in range(data["count"]):
        run = columns["run_id"]["values"][place]
        run_id = names[columns["cell_id"]["values"][place]] if run is None else columns["run_id"]["words"][run]
        root = data["roots"][columns["root"]["values"][place]]
        assert (ledger.folder / "analysis" / root / run_id / "result.json").is_file()


def test_links_to_figures_lead_somewhere(page: str, ledger: Ledger) -> None:
    links = re.findall(r'<a href="([^"#:]+\.pdf)"', page)
    assert len(links) >= 7
    assert all((ledger.folder / "analysis" / link).is_file() for link in links)


def test_a_claim_keeps_its_words_and_numbers_in_order() -> None:
    numbers = {"difference": number(0.5, ["a", "b"], "+.2f"), "p": number(0.01, ["a"], ".2f")}
    claim = Claim("RQ1", "all", "better by {difference} (p = {p}) {{sic}}", numbers, "a test")
    found = render_claim(claim)
    assert "".join(text for text, _ in found.parts) == claim.text == "better by +0.50 (p = 0.01) {sic}"
    assert [(text, ids) for text, ids in found.parts if ids] == [("+0.50", ("a", "b")), ("0.01", ("a",))]


class Tags(HTMLParser):
    """Counts elements; scripts that a name smuggled in would be among them."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.scripts += tag == "script"


def test_names_cannot_become_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.report.presentation.FIGURES", {})
    evil = "</script><script>alert(1)</script>"
    cells = [replace(cell, method=evil if cell.method == "random" else cell.method) for cell in make_cells()]
    ledger = sound_ledger(tmp_path / "results", cells)
    write_report([ledger.folder])
    text = (ledger.folder / "analysis" / "report.html").read_text("utf-8")
    parser = Tags()
    parser.feed(text)
    assert parser.scripts == 2
    assert evil not in text


def test_a_bundle_has_everything_and_its_links_hold(ledger: Ledger, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (ledger.run_folder(ledger.sweeps()[0].cells[0]["run_id"]) / "adapter").mkdir(exist_ok=True)
    count = write_bundle([ledger.folder], bundle)
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert len(files) == count
    assert not list(bundle.rglob("adapter"))
    sums = dict(reversed(line.split("  ")) for line in (bundle / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {path.relative_to(bundle).as_posix() for path in files} - {"SHA256SUMS"}
    name = "CITATION.cff"
    assert sums[name] == hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    data = read_data((bundle / "analysis" / "report.html").read_text("utf-8"))
    assert data["roots"] == ["../results/runs"]
    for run in (bundle / "results" / "runs").iterdir():
        assert {"result.json", "config.yaml", "examples.parquet"} <= {path.name for path in run.iterdir()}
    assert {"constraints.txt", "packages.json"} == {path.name for path in (bundle / "environment").iterdir()}


def test_the_citation_is_yaml_and_names_the_sources() -> None:
    found = yaml.safe_load(citation())
    assert found["cff-version"] == "1.2.0"
    assert found["title"] == "tune-sparse"
    addresses = [reference["url"] for reference in found["references"]]
    assert len(addresses) > 20
    assert "https://doi.org/10.1145/3731599.3767395" in addresses


def test_the_repository_says_how_to_cite_the_program() -> None:
    path = Path(__file__).parents[1] / "CITATION.cff"
    assert yaml.safe_load(path.read_text("utf-8")) == PROGRAM
    assert yaml.safe_load(citation()).items() >= {name: PROGRAM[name] for name in PROGRAM if name != "message"}.items()


def test_a_bundle_never_overwrites(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a bundle needs a folder of its own, .* exists\. Give another --bundle"):
        write_bundle([ledger.folder], tmp_path)
    with pytest.raises(InputError, match="the folder of --bundle must exist"):
        write_bundle([ledger.folder], tmp_path / "none" / "bundle")


def test_an_empty_folder_is_said_with_status_1_and_nothing_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--results-dir", str(tmp_path)]) == 1
    assert f"a report needs a sweep, {tmp_path} has none. Run `tune-sparse sweep` first." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_a_finished_run_has_status_1_and_no_figure(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write_sweep(make_sweep([make_run().cell]))
    ledger.write_record(make_run(), failed_record(make_run()))
    assert main(["report", "--results-dir", str(tmp_path)]) == 1
    assert not list((tmp_path / "analysis").glob("*.png"))
    assert "1 failed; 0 distinct runs" in (tmp_path / "analysis" / "report.html").read_text("utf-8")


def test_wrong_published_numbers_stop_the_report_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = sound_ledger(tmp_path / "results")
    (tmp_path / "own.csv").write_text("model\n")
    assert main(["report", "--results-dir", str(ledger.folder), "--baselines", str(tmp_path / "own.csv")]) == 2
    assert "own.csv, line 1: each column must be there once" in capsys.readouterr().err
    assert not (ledger.folder / "analysis").exists()
