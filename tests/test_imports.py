"""Imports point down, by folder: the order below is the architecture."""

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

LEVELS = (
    {"search_spaces", "tune_sparse.errors"},
    {"tune_sparse.files", "tune_sparse.identity", "tune_sparse.net", "tune_sparse.watchdog"},
    {"tune_sparse.modes", "tune_sparse.schedules"},
    {"tune_sparse.config"},
    {"tune_sparse.data"},
    {"tune_sparse.training"},
    {"tune_sparse.models"},
    {"tune_sparse.pruning"},
    {"tune_sparse.lora", "tune_sparse.evaluation"},
    {"tune_sparse.ledger"},
    {"tune_sparse.cerebras", "tune_sparse.tracking", "analysis.read"},
    {"analysis.stats"},
    {"analysis.audit", "analysis.baselines"},
    {"analysis.report"},
    {"trainables"},
    {"tune_sparse.sweep", "tune_sparse.export"},
    {"tune_sparse.search"},
    {"tune_sparse.doctor"},
    {"tune_sparse.cli"},
    {"tune_sparse.__main__"},
)
"""Folders and top-level modules, the lowest first. A module imports its own folder and those of lower levels."""
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}

LIBRARIES = {
    "ray": {"trainables", "tune_sparse.sweep", "tune_sparse.search", "tune_sparse.doctor"},
    "mlflow": {"tune_sparse.tracking"},
    "optuna": {"tune_sparse.search", "analysis.report"},
    "lm_eval": {"tune_sparse.evaluation"},
    "scipy": {"analysis.stats"},
    "statsmodels": {"analysis.stats"},
}
"""The only folders that import a library."""
CORE = {folder for folder, level in LEVEL.items() if level <= LEVEL["tune_sparse.ledger"]} - {"search_spaces"}
CORE_LIBRARIES = {
    *("torch", "numpy", "safetensors", "tokenizers", "transformers", "peft", "accelerate", "huggingface_hub"),
    *("yaml", "filelock", "psutil", "pyarrow", "datasets", "lm_eval"),
    "matplotlib",  # the histograms of masks
}


def modules(file: str) -> Iterator[str]:
    """Every module that a file imports, wherever in the file; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def owning_folder(module: str) -> str:
    """The folder, or top-level module, that a dotted name belongs to."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in ("tune_sparse", "analysis") else parts[0]


def list_files(folder: str) -> list[str]:
    return [file for file in FILES if owning_folder(file.removesuffix(".py").replace("/", ".")) == folder]


def libraries(file: str) -> set[str]:
    """The packages that a file imports, but for ours and the standard library's."""
    return {module.split(".")[0] for module in modules(file)} - {*FOLDERS} - sys.stdlib_module_names


def test_every_folder_has_its_level() -> None:
    folders = {owning_folder(file.removesuffix(".py").replace("/", ".")) for file in FILES}
    packages = {"tune_sparse.__init__", "analysis.__init__", "cluster"}
    assert folders - packages == set(LEVEL)
    assert len(LEVEL) <= 30, "a reader sees at most 30 folders and top-level modules first"


@pytest.mark.parametrize("folder", sorted(LEVEL))
def test_imports_point_down(folder: str) -> None:
    assert list_files(folder)
    for file in list_files(folder):
        imported = {owning_folder(module) for module in modules(file) if module.split(".")[0] in FOLDERS}
        upward = {other for other in imported & set(LEVEL) if other != folder and LEVEL[other] >= LEVEL[folder]}
        assert upward == set(), file


def test_no_files_import_each_other_in_a_circle() -> None:
    """Neither within functions nor for their types alone."""
    files = {file.removesuffix(".py").replace("/", "."): file for file in FILES}
    needs = {
        name: {part for module in modules(file) for part in (module, module.rpartition(".")[0])} & set(files) - {name}
        for name, file in files.items()
    }
    while free := {name for name, needed in needs.items() if not needed}:
        needs = {name: needed - free for name, needed in needs.items() if name not in free}
    assert needs == {}


def test_imports_within_functions_count() -> None:
    assert "torch" in libraries("tune_sparse/pruning/masks.py")
    assert "tune_sparse.config.Protocol" in set(modules("tune_sparse/data/splits.py"))
    assert "yaml" in libraries("tune_sparse/ledger/run.py")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    assert {folder for folder in LEVEL for file in list_files(folder) if library in libraries(file)} == LIBRARIES[
        library
    ]


@pytest.mark.parametrize("folder", sorted(CORE))
def test_the_core_needs_only_its_libraries(folder: str) -> None:
    assert {library for file in list_files(folder) for library in libraries(file)} <= CORE_LIBRARIES


def test_search_spaces_need_only_the_standard_library() -> None:
    assert {library for file in list_files("search_spaces") for library in libraries(file)} == set()


def test_cluster_holds_no_code() -> None:
    assert [file for file in FILES if file.startswith("cluster/")] == ["cluster/__init__.py"]


def test_analysis_reads_records_and_never_trains() -> None:
    files = [file for file in FILES if file.startswith("analysis/")]
    assert len(files) >= 25
    for file in files:
        assert libraries(file).isdisjoint({"torch", "transformers", "peft", "ray", "mlflow"}), file


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


def test_the_guard_of_a_cerebras_training_loads_the_standard_library_alone() -> None:
    loaded = loaded_by("import tune_sparse.cerebras.guard") - loaded_by("pass")
    assert loaded - sys.stdlib_module_names == {"tune_sparse"}


def test_help_loads_nothing_heavy() -> None:
    show_help = "from tune_sparse.cli import parser\nparser().format_help()"
    assert loaded_by(show_help).isdisjoint({"torch", "ray", "pandas", "mlflow", "transformers", "numpy"})


def test_importing_analysis_loads_no_torch() -> None:
    assert loaded_by("import analysis.report.report").isdisjoint({"torch", "ray", "mlflow"})
