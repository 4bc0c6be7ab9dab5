"""A stand-in for the site's Cerebras environment: a folder whose `bin/python` answers as the real one would.

It probes as release 2.10.0, "converts" a checkpoint by pointing to it, and trains nothing: it reports the loss of the
model that the job's files describe, then falling ones, and leaves an adapter. A file `fault` beside it makes it fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

BIN = """#!/bin/sh
exec env PYTHONPATH="{root}" OMP_NUM_THREADS=1 "{python}" "{program}" "{faults}" "{losses}" "$@"
"""
STEP_SECONDS = 0.02
ON_A_WAFER = {"refused": "ApplianceCompilationError: the kernels do not fit", "busy": "StatusCode.UNAVAILABLE"}
STAGE_SECONDS = 0.1


def write_environment(folder: Path, losses: Path) -> Path:
    """A stand-in virtual environment, and Model Zoo beside it; returns the folder of both, `venv` and `modelzoo`.

    losses: a folder for the first losses of trainings: to compute one takes seconds, most of them for imports.
    """
    losses.mkdir(parents=True, exist_ok=True)
    binary = folder / "venv" / "bin" / "python"
    binary.parent.mkdir(parents=True)
    (folder / "modelzoo" / "cerebras" / "modelzoo").mkdir(parents=True)
    root = Path(__file__).parents[1]
    places = {"faults": folder / "fault", "losses": losses}
    binary.write_text(BIN.format(root=root, python=sys.executable, program=__file__, **places))
    binary.chmod(0o755)
    return folder


def main(fault: str, losses: Path, arguments: list[str]) -> None:
    if arguments[:2] == ["-I", "-c"]:
        print(json.dumps({"python": "3.11.0", "packages": dict.fromkeys(_packages(), "2.10.0")}))
    elif arguments[:1] == ["-c"]:
        if fault == "converter":
            sys.exit("ClusterConfigError: unreachable")
        print(json.dumps(["R_2.9.0" if fault == "version" else "1.14.0", "1.9.3"]))
    elif arguments[:2] == ["-m", "cerebras.modelzoo.cli.main"]:
        _convert(fault, Path(arguments[arguments.index("--output-dir") + 1]), Path(arguments[-1]))
    else:
        _train(fault, losses, Path(arguments[-1]))


def _packages() -> tuple[str, ...]:
    from tune_sparse.cerebras.environment import NEEDED

    return NEEDED


def _convert(fault: str, output: Path, index: Path) -> None:
    if fault == "converter":
        sys.exit("ValueError: the converter cannot")
    (output / "config.yaml").write_text(str((index.parent / "model.safetensors").resolve().parent))
    (output / "model.mdl").touch()


def _train(fault: str, losses: Path, folder: Path) -> None:
    from safetensors.numpy import save_file

    if fault == "unavailable":
        sys.exit("StatusCode.UNAVAILABLE")
    if fault == "disk":
        sys.exit("OSError: [Errno 122] Disk quota exceeded")
    job, base = (json.loads((folder / name).read_text()) for name in ("job.json", "base.json"))
    (folder / "start.mdl").touch()
    if job["target"] == "csx":
        if fault in ON_A_WAFER:
            sys.exit(ON_A_WAFER[fault])
        _log_as_on_a_wafer(is_cached=_is_compiled(losses.parent / "compiled", job, base["config"]))
    if job["compile_only"] or job["target"] == "validate":
        found = {"peak_memory_bytes": 1, "sparsity_annotations": len(job["annotated"])}
        (folder / "report.json").write_text(json.dumps({"seconds": 1.0, "release": "2.10.0", "steps": 0, **found}))
        return
    loss = 9.9 if fault == "dense" else _known_first_loss(losses, job, Path(base["config"]).read_text())
    before = job["restart"]["step"] if job["restart"] else 0
    with (folder / "metrics.jsonl").open("a", buffering=1) as lines:
        lines.write(json.dumps({"at": time.monotonic(), "step": 0}) + "\n")
        for step in range(before + 1, job["steps"] + 1):
            if (folder / "stop").exists():
                return
            if fault == "kill" and step == 3:
                os.kill(os.getpid(), 9)
            time.sleep(30 if fault == "hang" and step == 3 else STEP_SECONDS)
            shown = float("nan") if fault == "nan" and step == 2 else _falling(loss, step, job)
            lines.write(json.dumps({"at": time.monotonic(), "step": step, "loss": shown}) + "\n")
            if step % (job["checkpoint_steps"] or job["steps"]) == 0:
                _save_checkpoint(folder / "model_dir", step)
    masks = _ended_masks(job)
    save_file(_trained(job, Path(base["config"]).read_text()), folder / "trained.safetensors")
    if job["changes"]:
        save_file({name: masks[name] for name in job["pruned"]}, folder / "trained_masks.safetensors")
    zeros = {name: int((~masks[name]).sum()) for name in job["pruned"]}
    changed = ["model.lm_head.weight"] if fault == "changed" else []
    report = {"seconds": 1.0, "release": "2.10.0", "peak_memory_bytes": 1, "steps": job["steps"]}
    (folder / "report.json").write_text(json.dumps(report | {"changed": changed, "zeros": zeros}))


def _ended_masks(job: dict[str, Any]) -> dict[str, Any]:
    """Bool masks of every matrix; a schedule keeps the first of its weights, as many as it was told."""
    import numpy as np
    from safetensors.numpy import load_file

    ended = {}
    for name, bits in load_file(job["masks"]).items():
        size = job["shapes"][name][0] * job["shapes"][name][1]
        keep = np.unpackbits(bits)[:size].astype(bool)
        if job["changes"] and name in job["pruned"]:
            keep = np.arange(size) < job["changes"]["kept"][name][-1]
        ended[name] = keep.reshape(job["shapes"][name])
    return ended


def _trained(job: dict[str, Any], model_folder: str) -> dict[str, Any]:
    """Adapters, or matrices, that moved a little where they are trained."""
    import numpy as np
    from safetensors.numpy import load_file

    if job["trains"] == "adapters":
        update = 0.01 if job["update_is_masked"] else 0.02  # as trainings of two modes end in two places
        return {n: t if n.endswith("lora_A") else t + np.float32(update) for n, t in load_file(job["adapter"]).items()}
    import torch

    from tune_sparse.models.model_zoo import hugging_face_name, interleaved

    dense = load_file(Path(model_folder) / "model.safetensors")
    config = json.loads((Path(model_folder) / "config.json").read_text())
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    trained = {}
    for name, keep in _ended_masks(job).items():
        weight = hugging_face_name(name)
        rows = interleaved(weight, torch.from_numpy(dense[weight]), head_dim).numpy()
        trained[name] = (rows + np.float32(0.001)) * keep
    return trained


def _is_compiled(cache: Path, job: dict[str, Any], config: str) -> bool:
    """Whether a job's graph was compiled before; now it is. It is what the job says, and the shape of its examples."""
    from safetensors import safe_open

    with safe_open(Path(job["examples"]) / "tokens.safetensors", framework="np") as tokens:
        width = tokens.get_slice("examples").get_shape()[2]
    names = ("trains", "update_is_masked", "annotated", "changes", "shapes", "batch_size", "rank")
    graph = [config, width, *(json.dumps(job[name], sort_keys=True) for name in names)]
    known = cache / hashlib.sha256(repr(graph).encode()).hexdigest()
    cache.mkdir(exist_ok=True)
    was_there = known.exists()
    known.touch()
    return was_there


def _log_as_on_a_wafer(is_cached: bool) -> None:
    """The lines by which the stages of a job are known, each stage `STAGE_SECONDS` long."""
    for text in (
        "Compiling the model. This may take a few minutes.",
        "Poll ingress status: Waiting for job running, current job status: Queueing, msg: job is queueing.",
        "Poll ingress success: Job ingress ready",
        *(['Found existing cached compile with hash: "cs_356484260818439097"'] if is_cached else []),
        "Compile estimated performance: 34.1 samples/sec (34.1 samples/sec/system). Estimate may vary by 10-25%",
        "Compile was successful!",
        "Beginning appliance run",
    ):
        now = datetime.now()
        print(f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03} INFO:   {text}", flush=True)
        time.sleep(STAGE_SECONDS)


def _save_checkpoint(model_dir: Path, step: int) -> None:
    model_dir.mkdir(exist_ok=True)
    (model_dir / f"checkpoint_{step}.mdl").touch()
    print(f"INFO:   Saved checkpoint {model_dir}/checkpoint_{step}.mdl", flush=True)


def _falling(loss: float, step: int, job: dict[str, object]) -> float:
    return loss if step == 1 else loss / (step + bool(job["update_is_masked"]))


def _known_first_loss(losses: Path, job: dict[str, object], model_folder: str) -> float:
    """Computed once for each model, masks and examples."""
    examples = Path(str(job["examples"])) / "tokens.safetensors"
    files = [examples, *(Path(str(job[kind])) for kind in ("masks", "weights") if job[kind])]
    read = [model_folder, job["batch_size"], *(path.read_bytes() for path in files)]
    known = losses / hashlib.sha256(repr(read).encode()).hexdigest()
    if not known.exists():
        own = known.with_suffix(f".{os.getpid()}")
        own.write_text(repr(_first_loss(job, model_folder)))
        own.rename(known)
    return float(known.read_text())


def _first_loss(job: dict[str, object], model_folder: str) -> float:
    """Of the pruned model on the examples of the first step, as the job's files say."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from tune_sparse.models.checkpoints import load_model, prunable_weights
    from tune_sparse.models.dims import ModelDims
    from tune_sparse.models.model_zoo import cerebras_name, separated

    model = load_model(Path(model_folder), torch.float32, torch.device("cpu"))
    masks = load_file(job["masks"])  # type: ignore[arg-type]
    head_dim = ModelDims.from_config(model.config).head_dim
    updated = load_file(job["weights"]) if job["weights"] else {}  # type: ignore[arg-type]
    for name, weight in prunable_weights(model).items():
        if updated:
            weight.copy_(separated(name, updated[cerebras_name(name)], head_dim))
        bits = np.unpackbits(masks[cerebras_name(name)].numpy())[: weight.numel()]
        weight.mul_(separated(name, torch.from_numpy(bits).view(weight.shape), head_dim))
    tokens = load_file(Path(str(job["examples"])) / "tokens.safetensors")
    ids, loss_mask, labels = tokens["examples"][tokens["order"][: job["batch_size"]]].long().unbind(1)  # type: ignore[misc]
    with torch.no_grad():
        losses = F.cross_entropy(model(input_ids=ids).logits.transpose(1, 2), labels, reduction="none")
    return float((losses * loss_mask).sum() / loss_mask.sum())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    main(path.read_text().strip() if path.exists() else "", Path(sys.argv[2]), sys.argv[3:])
