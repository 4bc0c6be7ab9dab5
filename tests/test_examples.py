"""The examples of docs/examples and the README run, on a model of two steps and with fewer steps of training."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from factories import write_boolq

from tune_sparse.cli import main
from tune_sparse.cli.command import OK
from tune_sparse.sweep import driver

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
FEW = {"steps": 2, "warmup_fraction": 0.0, "n_train": 32, "n_test": 8, "n_selection": 4, "eval_every": 2}
FEW |= {"data_dir": "synthetic", "global_batch_size": 16, "max_tokens": 256, "max_new_tokens": 40}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def swept(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of sweep.py."""
    folder = tmp_path_factory.mktemp("examples") / "results"
    example("sweep").main(str(folder), models=[str(llama)], **FEW)
    return folder


def test_a_sweep_from_python_and_one_from_yaml_are_the_same(
    swept: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [
        "--no-report",
        "--models",
        str(llama),
        "--results-dir",
        str(swept),
        "--set",
        *(f"{n}={v}" for n, v in FEW.items()),
    ]
    assert main(["sweep", "--config", str(FOLDER / "sweep.yaml"), *chosen]) == OK
    assert "0 trainings in" in capsys.readouterr().out


def test_the_file_of_a_sweep_says_what_its_python_says() -> None:
    settings = yaml.safe_load((FOLDER / "sweep.yaml").read_text(encoding="utf-8"))
    assert settings == example("sweep").AXES | {"results_dir": "results/example"}


def test_a_sweep_that_is_done_is_shown_again(swept: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("sweep").main(str(swept), models=[str(llama)], **FEW)
    printed = capsys.readouterr().out
    assert "0 trainings, 0 failed, 0 left" in printed
    assert [line.split()[:2] for line in printed.splitlines()[-4:]] == [
        ["unstructured", "0.0"],
        ["unstructured", "0.5"],
        ["random", "0.0"],
        ["random", "0.5"],
    ]


def test_mlflow_shows_the_trainings_of_a_sweep(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)  # MLflow makes a database where it is asked for its address
    before = mlflow.get_tracking_uri()
    try:
        example("mlflow_view").main(str(swept))
    finally:
        mlflow.set_tracking_uri(before)
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow sets it with its address, for every later test
    _, *trainings = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in trainings) == ["none", "random", "unstructured"]


def test_a_pruned_checkpoint_is_valid(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("prune").main(str(llama), str(tmp_path))
    assert capsys.readouterr().out.splitlines()[-1] == "valid"


def test_a_checkpoint_is_scored(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("evaluate").main(str(llama), n_test=4)
    assert "'accuracy': " in capsys.readouterr().out


def test_every_example_has_its_line_and_the_readme_leads_to_them() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}
    assert set(re.findall(r"^\| \[(.+?)\]", page, re.MULTILINE)) == files
    assert "(docs/examples/README.md)" in README


@pytest.fixture
def python_of_the_readme(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The README's Python, in a folder that has the checkpoint and the examples that it names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "my-llama")
    write_boolq(Path("data"), train=300, validation=10)
    [code] = re.findall(r"^ *```python\n(.+?)^ *```", README, re.MULTILINE | re.DOTALL)
    return textwrap.dedent(code)


def test_the_python_of_the_readme_asks_for_a_sound_sweep(
    python_of_the_readme: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "run_sweep", lambda plan: SimpleNamespace(done=0, plan=plan))
    exec(python_of_the_readme, {})
    assert capsys.readouterr().out == "0 of 3 trainings are done\n"


@pytest.mark.slow
def test_the_python_of_the_readme_works_as_it_is_written(
    python_of_the_readme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(python_of_the_readme, {})
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 3 trainings are done"
