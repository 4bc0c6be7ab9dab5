"""The real thing: Model Zoo's Trainer on the CPU backend, its converter, and the compiler's front end.

Skipped unless CEREBRAS_VENV names an environment with cerebras_pytorch (`make cerebras-env`) and MODELZOO the `src` of
a checkout of Model Zoo, which is not on PyPI.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from factories import finished, tiny_run
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from trainables.cerebras_backend import CerebrasTraining
from trainables.pipeline import run_cell
from trainables.worker import WorkerCache
from tune_sparse.cerebras.appliance import name_label, results_label, run_label
from tune_sparse.cerebras.conversion import to_cerebras, to_hugging_face
from tune_sparse.cerebras.environment import SiteEnvironment
from tune_sparse.cerebras.failures import ApplianceError, classify_failure
from tune_sparse.cerebras.job import job_appliance
from tune_sparse.cerebras.preflight import matrix_shapes
from tune_sparse.cli import main
from tune_sparse.config import Cerebras
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.run import Run
from tune_sparse.models.checkpoints import check_checkpoint, find_folder, prunable_weights, read_config
from tune_sparse.models.model_zoo import cerebras_name, interleaved, zoo_tensor_name
from tune_sparse.models.safetensors_io import TensorFiles, weight_files
from tune_sparse.modes import MODES

LOSS_TOLERANCE = 5e-3
"""Relative, of 20 losses in float32. Model Zoo's AdamW adds epsilon before its bias correction, torch's after it."""


def run_there(environment: SiteEnvironment, code: str, *arguments: object) -> str:
    """What the code prints there as its last line."""
    command = [str(environment.python), "-c", code, *map(str, arguments)]
    ran = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, timeout=300)
    assert not ran.returncode, ran.stderr
    return (ran.stdout.splitlines() or [""])[-1]


READ_MDL = """
import sys, torch, cerebras.pytorch as cstorch
from safetensors.torch import save_file
loaded = cstorch.load(sys.argv[1], map_location="cpu")["model"]
save_file({name: torch.tensor(t.float().numpy()) for name, t in loaded.items()}, sys.argv[2])
"""
WRITE_MDL = """
import sys, cerebras.pytorch as cstorch
from safetensors.torch import load_file
cstorch.save({"model": load_file(sys.argv[2])}, sys.argv[1])
"""
IN_BFLOAT16 = """
import sys, torch, cerebras.pytorch as cstorch
cstorch.backend("CPU")
loaded = cstorch.load(sys.argv[1], map_location="cpu")["model"]
cstorch.save({"model": {name: t.to(torch.bfloat16) for name, t in loaded.items()}}, sys.argv[2])
"""
UNSUPPORTED = """
import sys, torch, cerebras.pytorch as cstorch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
    def forward(self, x):
        return torch.linalg.svdvals(self.layer(x)).sum()
backend = cstorch.backend("CSX", artifact_dir=sys.argv[1], validate_only=True)
with backend.device:
    model = Model()
compiled = cstorch.compile(model, backend)
def examples():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 8)), batch_size=8)
@cstorch.trace
def step(batch):
    return compiled(batch[0])
for batch in cstorch.utils.data.DataExecutor(cstorch.utils.data.DataLoader(examples), num_steps=1):
    step(batch)
"""


def losses(ledger: Ledger, run: Run) -> torch.Tensor:
    lines = (ledger.run_folder(run.run_id) / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([line["train_loss"] for line in map(json.loads, lines) if "train_loss" in line])


@pytest.mark.modelzoo
@pytest.mark.parametrize("mode", ["dense", "sparse-to-dense", "sparse-to-sparse", "masked-finetuning"])
def test_losses_are_those_of_the_torch_backend(
    folder: Path, environment: SiteEnvironment, mode: str, tmp_path: Path
) -> None:
    """20 steps with the same tokens, loss masks, order, first adapters and rates."""
    ledger, sparsity = Ledger(tmp_path), 0.0 if mode == "dense" else 0.5
    rate = 1e-3 if mode == "masked-finetuning" else 1e-2
    here = tiny_run(folder, mode=mode, sparsity=sparsity, steps=20, learning_rate=rate)
    there = replace(
        tiny_run(folder, mode=mode, sparsity=sparsity, steps=20, learning_rate=rate, backend="cerebras"),
        cerebras={"target": "cpu", "release": environment.release},
    )
    for run in (here, there):
        record = finished(run, ledger)
        assert record.status == "done", record.error
    expected, found = losses(ledger, here), losses(ledger, there)
    assert len(found) == 20
    assert float(((found - expected) / expected).abs().max()) < LOSS_TOLERANCE
    assert found[-4:].mean() < found[:4].mean()
    report = json.loads((ledger.run_folder(there.run_id) / "validation_report.json").read_text())
    assert report["all_valid"]
    assert report["actual_sparsity"] == pytest.approx(sparsity, abs=0.01)


def altered(folder: Path, target: Path, **config: Any) -> Path:
    """The same checkpoint under another config."""
    shutil.copytree(folder, target)
    known = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(known | config))
    return target


def tied(folder: Path, target: Path) -> Path:
    """The same checkpoint with its embeddings as its output layer, which is not stored."""
    altered(folder, target, tie_word_embeddings=True)
    path = target / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if name != "lm_head.weight"}, path, {"format": "pt"})
    return target


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.modelzoo
@pytest.mark.parametrize("kind", ["llama3", "tied"])
def test_scaled_rotary_and_tied_embeddings_train_there(
    llama: Path, environment: SiteEnvironment, kind: str, tmp_path: Path
) -> None:
    """The first loss is torch's within 1e-3 of it, or the run fails; and it is not that of the model as it was."""
    rope = {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 16}}
    model = tied(llama, tmp_path / kind) if kind == "tied" else altered(llama, tmp_path / kind, **rope)
    first = []
    for folder in (llama, model):
        on_cpu = {"target": "cpu", "release": environment.release}
        run = replace(tiny_run(folder, steps=2, backend="cerebras"), cerebras=on_cpu)
        ledger = Ledger(tmp_path / f"results_{folder.name}")
        record = finished(run, ledger)
        assert record.status == "done", record.error
        first.append(float(losses(ledger, run)[0]))
    assert abs(first[0] - first[1]) > 1e-4


@pytest.mark.modelzoo
@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
def test_a_real_model_begins_with_the_loss_that_torch_has(
    environment: SiteEnvironment, mode: str, tmp_path: Path
) -> None:
    """Two steps, a minute: a first loss that is not torch's within 1e-3 of it fails the run."""
    if not os.environ.get("REAL_MODEL"):
        pytest.skip("REAL_MODEL must name the folder of a real model, such as SmolLM2-135M")
    sparsity = 0.5 if MODES[mode].is_pruned else 0.0
    run = tiny_run(Path(os.environ["REAL_MODEL"]), mode=mode, sparsity=sparsity, steps=2, n_test=4, backend="cerebras")
    run = replace(run, cerebras={"target": "cpu", "release": environment.release})
    record = finished(run, Ledger(tmp_path))
    assert record.status == "done", record.error


@pytest.mark.modelzoo
def test_the_converter_moves_rows_as_we_do_and_the_way_back_is_exact(
    folder: Path, environment: SiteEnvironment, tmp_path: Path
) -> None:
    """Pruned weights keep every zero through Hugging Face -> Model Zoo -> Hugging Face, bit for bit, and weights that
    are put under Model Zoo's names by us come back as they were."""
    checkpoint = check_checkpoint(str(folder))
    converted = to_cerebras(checkpoint.path, checkpoint.fingerprint, environment)
    run_there(environment, READ_MDL, converted.checkpoint, tmp_path / "cs.safetensors")
    theirs = load_file(tmp_path / "cs.safetensors")
    ours = TensorFiles(weight_files(folder))
    pruned: dict[str, torch.Tensor] = {}
    for name in matrix_shapes(folder):
        assert torch.equal(interleaved(name, ours[name], checkpoint.dims.head_dim), theirs[cerebras_name(name)]), name
        keep = torch.rand(ours[name].shape, generator=torch.Generator().manual_seed(len(name))) > 0.5
        pruned[name] = ours[name] * keep
        theirs[cerebras_name(name)] = interleaved(name, pruned[name], checkpoint.dims.head_dim).contiguous()

    save_file(theirs, tmp_path / "merged.safetensors")
    run_there(environment, WRITE_MDL, tmp_path / "merged.mdl", tmp_path / "merged.safetensors")
    (tmp_path / "back").mkdir()
    merged = replace(converted, checkpoint=tmp_path / "merged.mdl")
    to_hugging_face(merged, read_config(folder)["model_type"], tmp_path / "back", environment)
    [path] = (tmp_path / "back").rglob("*.safetensors")
    back = load_file(path)
    for name, weight in pruned.items():
        assert torch.equal(back[name], weight), name
        assert int((back[name] == 0).sum()) == int((weight == 0).sum()) > 0


@pytest.mark.modelzoo
def test_a_converted_checkpoint_is_read_back_without_cerebras_software(
    folder: Path, environment: SiteEnvironment, tmp_path: Path
) -> None:
    """Hugging Face -> .mdl by Model Zoo's converter -> Hugging Face by our reader: equal to the bit, whichever config
    stands beside it."""
    pytest.importorskip("h5py", reason="h5py is not installed: pip install tune-sparse[cerebras-files]")
    checkpoint = check_checkpoint(str(folder))
    converted = to_cerebras(checkpoint.path, checkpoint.fingerprint, environment)
    run_there(environment, IN_BFLOAT16, converted.checkpoint, tmp_path / "half.mdl")
    for path in (*folder.glob("*.json"), converted.checkpoint):
        shutil.copy(path, tmp_path)
    (tmp_path / "params").mkdir()
    for path in (converted.checkpoint, converted.config, *folder.glob("tokenizer*")):
        shutil.copy(path, tmp_path / "params")
    described = check_checkpoint(str(tmp_path / "params" / converted.checkpoint.name))
    assert described.dims == checkpoint.dims
    wanted = AutoConfig.from_pretrained(folder)
    assert AutoConfig.from_pretrained(described.path).rope_parameters == wanted.rope_parameters
    own = TensorFiles(weight_files(folder))
    for name, dtype in ((converted.checkpoint.name, torch.float32), ("half.mdl", torch.bfloat16)):
        back = load_file(find_folder(str(tmp_path / name)) / "model.safetensors")
        assert back.keys() == set(own)
        assert all(torch.equal(back[weight], own[weight].to(dtype)) for weight in own), name


@pytest.mark.modelzoo
def test_a_pruned_mdl_is_read_by_cstorch_and_converted_by_model_zoo(
    folder: Path, environment: SiteEnvironment, tmp_path: Path
) -> None:
    """A .mdl that cstorch wrote on its CPU backend is pruned to one and validated, and they read what we wrote."""
    pytest.importorskip("h5py", reason="h5py is not installed: pip install tune-sparse[cerebras-files]")
    checkpoint = check_checkpoint(str(folder))
    converted = to_cerebras(checkpoint.path, checkpoint.fingerprint, environment)
    run_there(environment, IN_BFLOAT16, converted.checkpoint, tmp_path / "m.mdl")
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    prune = ["prune", str(tmp_path / "m.mdl"), "--sparsities", "0.5", "--output", str(tmp_path / "out")]
    assert main([*prune, "--checkpoints", "--mdl"]) == 0
    [masks], [pruned] = (tmp_path / "out").rglob("masks_*.safetensors"), (tmp_path / "out").rglob("model.mdl")
    assert main(["validate", str(pruned), "--masks", str(masks)]) == 0

    ours = load_file(find_folder(str(pruned)) / "model.safetensors")
    run_there(environment, READ_MDL, pruned, tmp_path / "read.safetensors")
    theirs = {name.removeprefix("model."): t for name, t in load_file(tmp_path / "read.safetensors").items()}
    for name, weight in ours.items():
        rows = interleaved(name, weight, checkpoint.dims.head_dim)
        assert torch.equal(theirs[zoo_tensor_name(name) or ""], rows.float()), name
    (tmp_path / "back").mkdir()
    written = replace(converted, checkpoint=pruned)
    to_hugging_face(written, read_config(folder)["model_type"], tmp_path / "back", environment)
    [path] = (tmp_path / "back").rglob("*.safetensors")
    back = load_file(path)
    assert all(torch.equal(back[name].float(), weight.float()) for name, weight in ours.items())


@pytest.mark.modelzoo
def test_without_a_cluster_a_csx_sweep_ends_before_it_trains(
    llama: Path, environment: SiteEnvironment, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tune_sparse", "sweep", "smoke", "--models", str(llama), "--backend", "cerebras"]
    command += ["--data-dir", "synthetic"]
    ran = subprocess.run(
        [*command, "--results-dir", str(tmp_path / "results")], capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 2, ran.stderr
    assert "training on a CS-3 needs a cluster, this machine knows none" in ran.stderr
    assert "user node" in ran.stderr
    assert not list((tmp_path / "results").glob("runs/*"))


@pytest.mark.modelzoo
def test_a_lost_training_ends_with_the_weights_of_an_undisturbed_one(
    llama: Path, environment: SiteEnvironment, tmp_path: Path
) -> None:
    """Killed after step 14, it goes on from its checkpoint of step 10: the same losses and weights, to the bit."""
    run = replace(
        tiny_run(llama, mode="sparse-to-sparse", steps=30, backend="cerebras"),
        cerebras={"target": "cpu", "release": environment.release},
    )
    stage = CerebrasTraining(Cerebras("cpu", checkpoint_steps=10))
    lost, whole = Ledger(tmp_path / "lost"), Ledger(tmp_path / "whole")
    lose_after(14, run, lost, stage)
    for ledger in (lost, whole):
        for _ in run_cell(run, ledger, WorkerCache(), stage):
            pass
    assert "goes on after step" in (lost.run_folder(run.run_id) / "train.log").read_text()
    assert torch.equal(losses(lost, run), losses(whole, run))
    records = [ledger.record(run.run_id) for ledger in (lost, whole)]
    assert len({record.metrics["weights_sha256"] for record in records if record}) == 1


def lose_after(last: int, run: Run, ledger: Ledger, stage: CerebrasTraining) -> None:
    """Kill a training after that step."""
    steps = run_cell(run, ledger, WorkerCache(), stage)
    while (step := next(steps)) is None or step.step < last:
        pass
    [child] = [p for p in psutil.process_iter(["cmdline"]) if is_child_in(ledger.folder, p.info["cmdline"] or [])]
    child.kill()
    with pytest.raises(ApplianceError, match="killed by signal 9"):
        list(steps)


def is_child_in(folder: Path, command: list[str]) -> bool:
    return any(part.endswith("child.py") for part in command) and str(folder) in " ".join(command)


SETTINGS = """
import json, sys
import cerebras.pytorch as cstorch
from cerebras.appliance.cluster_config import ClusterConfig
job = json.loads(sys.argv[1])
ClusterConfig(**job["cluster"])
cstorch.backends.csx.performance.micro_batch_size = job["micro_batch_size"]
"""


@pytest.mark.cerebras
def test_the_client_takes_every_setting(environment: SiteEnvironment, tmp_path: Path) -> None:
    settings = Cerebras(
        num_csx=2,
        mount_dirs=(str(tmp_path),),
        python_paths=(str(tmp_path),),
        num_workers_per_csx=2,
        automount=False,
        job_priority="p3",
        disable_version_check=True,
        csx_micro_batch_size="32",
    )
    labels = [run_label("r" * 64, "i" * 64), results_label("r" * 64), name_label("cerebras_llama_s50_12345678")]
    run_there(environment, SETTINGS, json.dumps(job_appliance(settings, labels)))


@pytest.mark.cerebras
def test_an_operation_that_does_not_lower_is_named(environment: SiteEnvironment, tmp_path: Path) -> None:
    with (tmp_path / "child.log").open("w") as log:
        command = [str(environment.python), "-c", UNSUPPORTED, str(tmp_path)]
        ran = subprocess.run(command, env=environment.variables(), stdout=log, stderr=log, cwd=tmp_path, timeout=300)
    assert ran.returncode
    error = classify_failure(tmp_path / "child.log", ran.returncode)
    assert "the compiler has no operation aten::_linalg_svd" in str(error)


@pytest.mark.modelzoo
def test_a_run_merges_to_the_weights_that_were_scored(
    llama: Path, environment: SiteEnvironment, tmp_path: Path
) -> None:
    """`merge --run` of a cell that Cerebras trained is a checkpoint whose accuracy is the recorded one."""
    from tune_sparse.evaluation.scoring import score
    from tune_sparse.export.merge import merge_run
    from tune_sparse.models.checkpoints import load_model

    ledger = Ledger(tmp_path / "results")
    run = replace(tiny_run(llama, backend="cerebras"), cerebras={"target": "cpu", "release": environment.release})
    record = finished(run, ledger)
    merge_run(ledger, run.run_id, tmp_path / "merged")
    worker = WorkerCache()
    loaded = worker.model(run)
    model = load_model(tmp_path / "merged", torch.float32, torch.device("cpu"))
    scored = score(model, loaded.tokenizer, worker.examples(run, loaded).tests, run.protocol)
    assert scored.metrics["accuracy"] == record.metrics["accuracy"]
    assert all(
        (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01) for weight in prunable_weights(model).values()
    )
