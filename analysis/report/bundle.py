"""A paper's artifact in one folder: the ledger, how it was made, tables, figures, checksums, CITATION."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import tune_sparse
from analysis.baselines.published import load_published
from analysis.report.page import inline_json
from analysis.report.runs import relative_link
from tune_sparse.errors import InputError
from tune_sparse.files import atomic_folder, write_json, write_text
from tune_sparse.ledger.ledger import Ledger

LEFT_OUT = ("adapter", "*.safetensors")
"""Files of a run's folder with trained weights, which are large and can be published as a model."""
LEDGER = ("sweeps", "runs", "pruned_baselines", "imported", "throughput", "searches", "evaluations", "set_aside")
CHECKSUMS = "SHA256SUMS"
CONSTRAINTS = Path(tune_sparse.__file__).parents[1] / "cluster" / "constraints.txt"
PROGRAM: dict[str, Any] = {
    "cff-version": "1.2.0",
    "message": "Please cite the program.",
    "title": "tune-sparse",
    "type": "software",
    "version": tune_sparse.__version__,
    "license": "Apache-2.0",
    "authors": [{"name": "The tune-sparse developers"}],
}
"""The program's own entry in a CITATION.cff; the repository's file has the same."""
README = """# Results of tune-sparse

Made by `tune-sparse report --bundle`.

- `analysis/report.html`: to be opened in a browser; every number leads to its run.
- `analysis/`: tables (CSV, LaTeX) and figures (PNG, PDF).
- `results*/`: the ledger: what was requested (`sweeps/`), each run with its configuration, result, validation and
  outcomes example by example (`runs/`). Adapters and weights are left out; `tune-sparse merge` makes a model of a run
  where the whole results folder is.
- `environment/`: the tested package versions (`constraints.txt`), those found here (`packages.json`), and each run's
  own in its `result.json`.
- `SHA256SUMS`: `sha256sum -c SHA256SUMS` checks every file.
- `CITATION.cff`: how to cite the program, and the published numbers that ours are compared with.
"""


def write_bundle(results_dirs: Sequence[Path], bundle: Path) -> int:
    """Write the folder `bundle` from folders that have a report in the first; returns how many files it holds.

    Raises `InputError` if the folder exists, or its parent does not.
    """
    check_bundle(bundle)
    with atomic_folder(bundle) as partial:
        shutil.copytree(results_dirs[0] / "analysis", partial / "analysis")
        for number, folder in enumerate(results_dirs):
            _copy_ledger(Ledger(folder), partial / _ledger_name(number))
        _relink(partial / "analysis" / "report.html", results_dirs)
        (partial / "environment").mkdir()
        shutil.copyfile(CONSTRAINTS, partial / "environment" / "constraints.txt")
        write_json(partial / "environment" / "packages.json", _packages())
        write_text(partial / "README.md", README)
        write_text(partial / "CITATION.cff", citation())
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sums = (f"{_sha256(path)}  {path.relative_to(partial).as_posix()}\n" for path in files)
        write_text(partial / CHECKSUMS, "".join(sums))
    return len(files) + 1


def check_bundle(bundle: Path) -> None:
    """Raise `InputError` unless `bundle` can be made."""
    if bundle.exists():
        raise InputError(f"a bundle needs a folder of its own, {bundle} exists. Give another --bundle.")
    if not bundle.parent.is_dir():
        raise InputError(f"the folder of --bundle must exist, {bundle.parent} does not. Make it.")


def citation() -> str:
    """CITATION.cff: the program, and the sources of the published numbers as references."""
    sources = {row.source: row.address for row in load_published()}
    references = [
        {"title": source, "type": "generic", "url": address, "authors": [{"name": f"The authors of {source}"}]}
        for source, address in sources.items()
    ]
    message = "Please cite the program, and the sources whose numbers you show."
    return yaml.safe_dump(PROGRAM | {"message": message, "references": references}, sort_keys=False, allow_unicode=True)


def _ledger_name(number: int) -> str:
    return "results" if number == 0 else f"results{number + 1}"


def _copy_ledger(ledger: Ledger, target: Path) -> None:
    """Everything but weights and what unfinished runs left."""
    for name in LEDGER:
        if (ledger.folder / name).is_dir():
            shutil.copytree(ledger.folder / name, target / name, ignore=shutil.ignore_patterns(*LEFT_OUT, ".*"))


def _relink(page: Path, results_dirs: Sequence[Path]) -> None:
    """Let the page's links to runs lead into the bundle."""
    original = results_dirs[0] / "analysis" / page.name
    text = page.read_text("utf-8")
    roots = [relative_link(folder / "runs", original) for folder in results_dirs]
    moved = [f"../{_ledger_name(number)}/runs" for number in range(len(results_dirs))]
    before, after = (inline_json({"roots": links})[1:-1] for links in (roots, moved))
    assert before in text
    write_text(page, text.replace(before, after))


def _packages() -> dict[str, str]:
    return dict(sorted(_installed()))


def _installed() -> Iterator[tuple[str, str]]:
    for found in importlib.metadata.distributions():
        yield found.metadata["Name"], found.version


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
