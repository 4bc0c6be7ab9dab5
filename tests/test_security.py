"""Nothing that comes from outside is run, no secret is written down, nobody without the token is let in."""

from __future__ import annotations

import ast
import json
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_head import PATIENCE_SECONDS, Head, ray_head

from tune_sparse.cerebras.environment import SiteEnvironment
from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT
from tune_sparse.errors import InputError
from tune_sparse.lora.adapter_io import load_adapter
from tune_sparse.models.checkpoints import check_checkpoint, load_model
from tune_sparse.pruning.mask_io import MaskFile
from tune_sparse.training.checkpoint import BrokenStateError, restore_into

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("tune_sparse", "trainables", "cluster", "analysis", "search_spaces")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


class Trap:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, sprung: Path) -> None:
        self._sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._sprung,)


@pytest.fixture
def sprung(tmp_path: Path) -> Iterator[Path]:
    """Never made, in any test that takes it."""
    path = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(path)))
    path.unlink()  # the trap works
    yield path
    assert not path.exists(), "a pickle was run"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def test_a_model_of_pickled_weights_is_refused(model: Path, sprung: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Trap(sprung), model / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"needs its safetensors weights, .*model\.safetensors is missing"):
        check_checkpoint(str(model))


def test_a_pickle_in_the_place_of_safetensors_is_refused(model: Path, sprung: Path) -> None:
    torch.save(Trap(sprung), model / "model.safetensors")
    with pytest.raises(InputError, match="must be a safetensors file"):
        check_checkpoint(str(model))


def test_pickled_weights_beside_safetensors_are_not_looked_at(model: Path, sprung: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Trap(sprung), model / name)
    check_checkpoint(str(model))
    load_model(model, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("model_type", ["llama", "never-heard-of"])
def test_code_that_a_model_brings_is_not_run(model: Path, sprung: Path, model_type: str) -> None:
    (model / "own.py").write_text(f"open({str(sprung)!r}, 'w')\nfrom transformers import LlamaConfig as Own\n")
    config = json.loads((model / "config.json").read_text())
    brought = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": "own.Own"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": brought, "model_type": model_type}))
    if model_type == "llama":
        check_checkpoint(str(model))
        load_model(model, torch.float32, torch.device("cpu"))
    else:
        with pytest.raises(InputError, match=r"model_type.*never-heard-of"):
            check_checkpoint(str(model))


def test_a_pickle_as_a_mask_is_refused(sprung: Path, tmp_path: Path) -> None:
    for contents in (Trap(sprung), {"model.weight": Trap(sprung)}):
        torch.save(contents, tmp_path / "masks.pt")
        with pytest.raises(InputError, match=r"masks\.pt must be a file of tensors.*Make it again") as refused:
            MaskFile(tmp_path / "masks.pt")
        assert "option" not in str(refused.value), "torch says how to run it"
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match="must be a file of tensors"):
        MaskFile(tmp_path / "plain.pt")


def test_a_pickle_as_a_checkpoint_of_a_training_is_refused(sprung: Path, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight])
    for name in ("parameters", "optimizer", "so_far", "random"):
        state: dict[str, Any] = {"identity": "a", "parameters": [weight.data], "optimizer": {}, "so_far": {}}
        torch.save(state | {name: Trap(sprung)}, tmp_path / "run.pt")
        assert zipfile.is_zipfile(tmp_path / "run.pt")
        with pytest.raises(BrokenStateError, match="cannot be read whole"):
            restore_into(tmp_path / "run.pt", "a", [weight], optimizer)


def test_a_pickle_as_an_adapter_is_refused(model: Path, sprung: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        torch.save(Trap(sprung), folder / name)
        loaded = load_model(model, torch.float32, torch.device("cpu"))
        with pytest.raises(InputError, match=r"adapter_model\.safetensors must be a whole safetensors file"):
            load_adapter(loaded, folder)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch {sprung}']", "steps: !!python/name:os.system"]
)
def test_code_in_a_yaml_file_is_refused(text: str, sprung: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text.format(sprung=sprung))
    arguments = ["--config", str(tmp_path / "own.yaml"), "--results-dir", str(tmp_path / "results")]
    assert main(["sweep", "smoke", *arguments]) == BAD_INPUT


@pytest.mark.cerebras
def test_a_pickle_as_a_cerebras_checkpoint_is_refused(
    environment: SiteEnvironment, sprung: Path, tmp_path: Path
) -> None:
    torch.save({"model": Trap(sprung)}, tmp_path / "model.mdl")
    code = f"import child; child.loaded({str(tmp_path / 'model.mdl')!r})"
    variables = environment.variables()
    paths = os.pathsep.join([str(ROOT / "tune_sparse" / "cerebras"), variables["PYTHONPATH"]])
    command = [str(environment.python), "-c", code]
    run = subprocess.run(command, env=variables | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert "a Cerebras checkpoint must be HDF5" in run.stderr


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_code_of_ours_unpickles() -> None:
    """`cstorch.load` is called in one function, which looks at the file first."""
    loads = 0
    for path in SOURCES:
        for name, call in calls(path):
            named = {keyword.arg: keyword.value for keyword in call.keywords}
            assert not name.startswith(("pickle.", "dill.", "joblib.", "marshal.", "shelve.")), f"{path}: {name}"
            assert "trust_remote_code" not in named, path
            assert "allow_pickle" not in named, path
            assert name != "yaml.load" or "CSafeLoader" in path.read_text(encoding="utf-8"), path
            assert name not in {"eval", "exec", "yaml.unsafe_load", "np.load", "pd.read_pickle"}, path
            if name == "torch.load":
                loads += 1
                assert ast.unparse(named["weights_only"]) == "True", path
            if name == "cstorch.load":
                loads += 1
                assert path.name == "child.py", path
    assert loads == 3


SECRET = "hunter2-0f9b"
ADDRESS = f"http://me:{SECRET}@mlflow:5000"


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["sweep", "smoke", "--tracking-uri", ADDRESS], {}),
        (["sweep", "smoke", "--dry-run", "--tracking-uri", f"postgresql://db/m?password={SECRET}"], {}),
        (["track", "--tracking-uri", ADDRESS], {}),
        (["track"], {"MLFLOW_TRACKING_URI": ADDRESS}),
        (["sweep", "smoke"], {"MLFLOW_TRACKING_URI": ADDRESS}),
        (["search", "--task", "boolq"], {"MLFLOW_TRACKING_URI": ADDRESS}),
    ],
)
def test_a_password_in_an_address_is_refused_before_anything_is_written(
    arguments: list[str],
    variables: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    results = tmp_path / "results"
    if arguments[0] == "track":
        results.mkdir()
    assert main([*arguments, "--results-dir", str(results)]) == BAD_INPUT
    printed = "".join(capsys.readouterr())
    assert "must hold no password" in printed
    assert SECRET not in printed
    assert not results.exists() or not list(results.iterdir())


def test_mlflow_is_opened_on_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str], **_: Any) -> subprocess.Popen[bytes]:
        started.append(command)
        return process([sys.executable, "-c", ""])

    process = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("tune_sparse.tracking.baselines.comparison_page", lambda uri: None)
    monkeypatch.setattr("tune_sparse.cli.ui.has_desktop", lambda: False)
    main(["ui", "--results-dir", str(tmp_path)])
    [command] = started
    assert command[command.index("--host") + 1] == "127.0.0.1"


@pytest.fixture(scope="module")
def planted() -> dict[str, str]:
    """{variable: a secret that is found nowhere else}"""
    names = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "WANDB_API_KEY")
    return {name: f"planted-{secrets.token_hex(8)}" for name in names}


@pytest.fixture(scope="module")
def head(planted: dict[str, str]) -> Iterator[Head]:
    with ray_head(**planted) as started:
        yield started


def files_with(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(
    head: Head, planted: dict[str, str], llama: Path, tmp_path: Path
) -> None:
    """A submitted sweep, some of whose trainings fail with a traceback."""
    sweep = ["smoke", "--models", str(llama), "--tasks", "boolq", "--results-dir", str(tmp_path / "results")]
    sweep += ["--data-dir", "synthetic"]
    sound = head.submit(sweep)
    failing = head.submit([*sweep, "--set", "learning_rate=1e30", "max_grad_norm=1e30"], "--submission-id", "failing")
    assert (sound.returncode, failing.returncode) == (0, 1), sound.stdout + failing.stdout
    assert (tmp_path / "results" / "mlflow.db").exists()
    assert list((tmp_path / "results" / "mlartifacts").rglob("train.log"))
    printed = sound.stdout + sound.stderr + failing.stdout + failing.stderr + head.ray("logs", "failing").stdout
    for secret in (*planted.values(), head.environment["RAY_AUTH_TOKEN"]):
        assert secret not in printed
        assert files_with(tmp_path, secret) == []


@pytest.mark.slow
def test_secrets_of_the_environment_are_not_written_by_a_cerebras_child(
    site: Path, planted: dict[str, str], llama: Path, tmp_path: Path
) -> None:
    few = ["--tasks", "boolq", "--methods", "unstructured", "--sparsities", "0.5", "--modes", "sparse-to-dense"]
    command = [sys.executable, "-m", "tune_sparse", "sweep", "smoke", "--models", str(llama), *few]
    command += ["--data-dir", "synthetic"]
    command += ["--backend", "cerebras", "--cerebras-target", "cpu", "--results-dir", str(tmp_path / "results")]
    command += ["--max-retries", "0", "--set", "steps=4", "n_test=20"]
    run = subprocess.run(command, env=os.environ | planted, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert list((tmp_path / "results" / "runs").iterdir()), run.stderr
    for secret in planted.values():
        assert secret not in run.stdout + run.stderr
        assert files_with(tmp_path, secret) == []


@pytest.mark.slow
@pytest.mark.parametrize("token", [secrets.token_hex(32), None])
def test_neither_the_job_server_nor_ray_lets_anybody_in_without_the_token(head: Head, token: str | None) -> None:
    environment = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    environment |= {"HOME": "/nonexistent"}  # no token is found there either
    listing = [Path(sys.executable).with_name("ray"), "job", "list", "--address", head.address]
    joining = [sys.executable, "-c", f"import ray; ray.init({head.gcs!r}); print('in', ray.cluster_resources())"]
    for command in (listing, joining):
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        assert run.returncode != 0
        assert "in {" not in run.stdout
        assert "uthenticat" in run.stdout + run.stderr or "oken" in run.stdout + run.stderr


@pytest.mark.slow
def test_dashboard_and_job_server_listen_on_this_machine_only(head: Head) -> None:
    """Ray's own ports are open to all, and its token protects them: docs/security.md."""
    listening = [(process, c) for process in head.processes() for c in process.net_connections("inet")]
    addresses = {c.laddr.port: c.laddr.ip for _, c in listening if c.status == "LISTEN"}
    assert addresses[int(head.address.rpartition(":")[2])] == "127.0.0.1"
