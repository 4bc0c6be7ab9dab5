"""The direction of imports: cli -> sweep -> search_spaces, trainables, tracking -> core."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tune_sparse", "search_spaces", "trainables", "cluster", "analysis")
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PROGRAM = {
    f"tune_sparse.{name}"
    for name in (
        *("plan", "forecast", "sweep", "dispatcher", "ray_callback", "progress"),
        *("tracking", "tracking_thread", "tracking_baselines", "search", "cli"),
        *("prune", "merge", "scorecard", "harness", "searchers"),
    )
}
CORE = [
    file
    for file in FILES
    if file.startswith("tune_sparse/")
    and not file.startswith("tune_sparse/cli/")
    and file[:-3].replace("/", ".") not in PROGRAM | {"tune_sparse.__main__"}
]
CORE_LIBRARIES = {
    *("torch", "numpy", "safetensors", "tokenizers", "transformers", "peft", "accelerate", "huggingface_hub"),
    *("yaml", "filelock", "psutil", "pyarrow", "datasets"),
    "matplotlib",  # the histograms of masks
}
RAY_FILES = {
    *("trainables/cell.py", "tune_sparse/search/trainable.py", "trainables/cs3.py", "trainables/remote_ledger.py"),
    *("tune_sparse/sweep/nodes.py", "tune_sparse/doctor/ray.py"),
    *("tune_sparse/sweep/driver.py", "tune_sparse/sweep/scheduler.py", "tune_sparse/sweep/callbacks.py"),
    *("tune_sparse/search/driver.py", "tune_sparse/search/samplers.py"),
}


def modules(file: str) -> Iterator[str]:
    """Every module that a file imports, wherever in the file; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(file: str) -> set[str]:
    return {module.split(".")[0] for module in modules(file)}


def from_standard_library(package: str) -> bool:
    return package in sys.stdlib_module_names


def imports_program(file: str) -> set[str]:
    return {found for module in modules(file) for found in PROGRAM if module == found or module.startswith(f"{found}.")}


def importers(package: str) -> set[str]:
    return {file for file in FILES if package in packages(file)}


def test_every_file_was_read() -> None:
    assert len(FILES) >= 38
    assert len(CORE) >= 18
    assert {file.split("/")[0] for file in FILES} == set(FOLDERS)
    assert "torch" in packages("tune_sparse/pruning/masks.py")
    assert "tune_sparse.config.Protocol" in set(modules("tune_sparse/data/splits.py"))
    assert "yaml" in packages("tune_sparse/ledger/ledger.py"), "imports within functions count"


def test_search_spaces_need_only_the_standard_library() -> None:
    files = [file for file in FILES if file.startswith("search_spaces/")]
    assert len(files) >= 2
    for file in files:
        assert all(from_standard_library(package) or package == "search_spaces" for package in packages(file)), file


@pytest.mark.parametrize("file", CORE)
def test_the_core_imports_only_the_core_and_its_libraries(file: str) -> None:
    foreign = {package for package in packages(file) if not from_standard_library(package)}
    assert foreign <= CORE_LIBRARIES | {"tune_sparse"}
    assert imports_program(file) == set()


def test_only_the_ray_glue_imports_ray() -> None:
    assert importers("ray") == RAY_FILES


def test_only_tracking_imports_mlflow() -> None:
    assert importers("mlflow") == {"tune_sparse/tracking/sync.py", "tune_sparse/tracking/baselines.py"}


def test_only_the_harness_imports_lm_eval() -> None:
    assert importers("lm_eval") == {"tune_sparse/evaluation/harness.py"}


def test_only_statistics_imports_scipy_and_statsmodels() -> None:
    assert importers("scipy") == importers("statsmodels") == {"analysis/stats/statistics.py"}


def test_only_searching_imports_optuna() -> None:
    assert importers("optuna") == {"tune_sparse/search/samplers.py", "analysis/search_plots.py"}


def test_analysis_reads_records_and_never_trains() -> None:
    files = [file for file in FILES if file.startswith("analysis/")]
    assert len(files) >= 5
    for file in files:
        assert packages(file).isdisjoint({"torch", "transformers", "peft", "ray", "mlflow", "trainables", "cluster"})
        assert imports_program(file) == set(), file


def test_trainables_know_nothing_above_them() -> None:
    files = [file for file in FILES if file.startswith("trainables/")]
    assert len(files) >= 8
    for file in files:
        assert packages(file).isdisjoint({"mlflow", "analysis", "search_spaces"}), file
        assert imports_program(file) == set(), file


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "module", [*FOLDERS, "tune_sparse.cli", "tune_sparse.config", "tune_sparse.data.tasks", "search_spaces.matrix"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert module.split(".")[0] in loaded
    assert loaded.isdisjoint({"torch", "ray", "pandas", "mlflow", "transformers", "numpy", "matplotlib", "rich"})


def test_help_loads_nothing_heavy() -> None:
    show_help = "from tune_sparse.cli import parser\nparser().format_help()"
    assert loaded_by(show_help).isdisjoint({"torch", "ray", "pandas", "mlflow", "transformers", "numpy"})


def test_importing_analysis_loads_no_torch() -> None:
    assert loaded_by("import analysis.report.report").isdisjoint({"torch", "ray", "mlflow"})
