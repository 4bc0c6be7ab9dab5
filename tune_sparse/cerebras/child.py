"""One training, or one lowering, with Cerebras Model Zoo: a program of the site's Cerebras environment.

    python cerebras_child.py JOB_FOLDER

It reads `job.json` of the folder and writes `metrics.jsonl` (a line a step), then `trained.safetensors` and
`report.json`. It imports nothing of tune_sparse, whose environment is another one; a backend exists once in a process.
A file named `stop` in the folder ends the training before its next step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import cerebras.pytorch as cstorch
import h5py
import torch
import yaml
from cerebras.appliance.cluster_config import ClusterConfig
from cerebras.modelzoo.models.nlp.llama.model import LlamaModel
from cerebras.modelzoo.models.nlp.mistral.model import MistralModel
from cerebras.modelzoo.trainer import Trainer
from cerebras.modelzoo.trainer.callbacks import (
    Checkpoint,
    KeepNCheckpoints,
    Logging,
    MixedPrecision,
    TrainingLoop,
)
from cerebras.modelzoo.trainer.loggers import Logger
from child_parts import Adapters, OnlyTrained, Schedule, Weights
from child_sparsity import sparsity_of
from safetensors.torch import load_file, save_file

MODELS = {"llama": LlamaModel, "mistral": MistralModel}
ADAMW_EPSILON = 1e-8
"""of torch's AdamW"""
READING_THERE = {"num_workers": 8, "prefetch_factor": 10, "persistent_workers": True}
"""On the appliance's input workers, as Cerebras' own configurations read."""
REJECTED = ("norm_first", "use_ff_layer1_dropout")
"""The converter of release 2.10 writes these, and its models refuse them."""


class JsonLines(Logger):
    """Each step's loss as a line of JSON, for the process that waits for it."""

    def __init__(self, path):
        self.stream = path.open("a", buffering=1)

    def log_metrics(self, metrics, step):
        values = {name: float(value) for name, value in metrics.items() if name == "loss" or "samples_per_sec" in name}
        if "loss" in values:
            self.write(step=step, **values)

    def write(self, **values):
        self.stream.write(json.dumps({"at": time.monotonic(), **values}) + "\n")


def main(folder):
    job = {**json.loads((folder / "job.json").read_text()), **json.loads((folder / "base.json").read_text())}
    reading = READING_THERE if job["target"] == "csx" else {"num_workers": 0}
    written = write_examples(Path(job["examples"]))
    examples = cstorch.utils.data.DataLoader(make_loader, written, job["batch_size"], reading)
    trainer = make_trainer(job, folder)
    trainer.early_exit.register((folder / "stop").exists)
    start = str(folder / "start.mdl")
    write_start(job, start)
    check_fits(start, trainer.model)
    started = time.monotonic()
    trainer.loggers[0].write(step=0)
    trainer.fit(examples, ckpt_path=write_resumed(job, start, folder) if job["restart"] else start)
    report = {"seconds": time.monotonic() - started, "release": cstorch.__version__}
    report["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job["target"] == "validate":
        report.update(lowered(folder))
    elif job["compile_only"]:
        report.update({"steps": 0})
    else:
        report.update(write_trained(job, folder, trainer))
    write_json(folder / "report.json", report)


def make_trainer(job, folder):
    """Model Zoo's Trainer with the protocol of the job."""
    config = yaml.safe_load(Path(job["config"]).read_text())["model"]
    config = {name: value for name, value in config.items() if name not in REJECTED}
    trained = Adapters(job) if job["trains"] == "adapters" else Weights(job["shapes"])
    return Trainer(
        backend=make_backend(job, folder),
        model_dir=str(folder / "model_dir"),
        model=lambda: MODELS[config["name"]](dict(config)),
        optimizer=functools.partial(make_optimizer, job),
        schedulers=[functools.partial(Schedule, job)],
        precision=make_precision(job),
        loop=TrainingLoop(max_steps=job["steps"], eval_frequency=None),
        checkpoint=Checkpoint(steps=job["checkpoint_steps"] or job["steps"], autoload_last_checkpoint=False),
        logging=Logging(log_steps=1, log_level="INFO"),
        callbacks=[trained, sparsity_of(job), OnlyTrained(job), KeepNCheckpoints(1)],
        loggers=[JsonLines(folder / "metrics.jsonl")],
        seed=job["seed"],
    )


def make_backend(job, folder):
    if job["target"] == "cpu":
        return cstorch.backend("CPU", artifact_dir=str(folder / "model_dir"))
    if job["target"] == "validate":
        return cstorch.backend("CSX", artifact_dir=str(folder / "model_dir"), validate_only=True)
    if job["micro_batch_size"] != "auto":
        micro_batch = None if job["micro_batch_size"] == "none" else job["micro_batch_size"]
        cstorch.backends.csx.performance.micro_batch_size = micro_batch
    options = {
        "compile_only": job["compile_only"],
        **({"compile_dir": job["compile_dir"]} if job["compile_dir"] else {}),
    }
    cluster = ClusterConfig(**job["cluster"])
    return cstorch.backend("CSX", artifact_dir=str(folder / "model_dir"), cluster_config=cluster, **options)


def make_optimizer(job, model):
    """AdamW on what is trained."""
    return cstorch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=job["learning_rate"],
        betas=tuple(job["betas"]),
        eps=ADAMW_EPSILON,
        weight_decay=job["weight_decay"],
        correct_bias=True,
    )


def make_precision(job):
    """Half precision where the protocol says so, and on a wafer, which has no other; gradients are clipped."""
    is_mixed = job["precision"] != "float32" or job["target"] != "cpu"
    half = "bfloat16" if job["target"] == "cpu" else job["half_precision"]
    scaling = {"loss_scaling_factor": "dynamic"} if half == "cbfloat16" else {}
    return MixedPrecision(enabled=is_mixed, fp16_type=half, max_gradient_norm=job["max_grad_norm"], **scaling)


def write_examples(folder):
    """The examples of every step as HDF5, (N, 3, T), once for all trainings on them; returns its folder."""
    target = folder / "hdf5"
    if not target.exists():
        tokens = load_file(folder / "tokens.safetensors")
        partial = folder / f".hdf5.{os.getpid()}.partial"
        partial.mkdir()
        examples, order = tokens["examples"].numpy(), tokens["order"].tolist()
        with h5py.File(str(partial / "examples.h5"), "w") as file:
            file.attrs["n_examples"] = len(order)
            data = file.create_dataset(
                "data", (len(order), *examples.shape[1:]), dtype="i4", chunks=(1, *examples.shape[1:])
            )
            for start in range(0, len(order), 256):
                data[start : start + 256] = examples[order[start : start + 256]]
        try:
            partial.rename(target)
        except OSError:  # another training was faster
            shutil.rmtree(str(partial))
    return str(target)


def make_loader(folder, batch_size, reading):
    """Model Zoo's own reader of HDF5, in the order of the file.

    It runs on the appliance's input workers, which have Model Zoo and nothing of this file: all it needs is in it.
    """
    from cerebras.modelzoo.data.nlp.gpt.GptHDF5MapDataProcessor import GptHDF5MapDataProcessor

    settings = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": folder, "batch_size": batch_size}
    return GptHDF5MapDataProcessor({**settings, **reading, "shuffle": False}).create_dataloader()


def write_start(job, path):
    """The converted dense checkpoint, pruned, with the adapters that the training begins with."""
    weights = dict(loaded(job["checkpoint"])["model"])
    weights.setdefault("lm_head.weight", weights["embedding_layer.word_embeddings.weight"])  # where they are tied
    weights.update(load_file(job["weights"]) if job["weights"] else {})
    under_sparsity = job["pruned"] if job["trains"] == "weights" else job["annotated"]
    for name, keep in keep_masks(job):
        weights[name] = weights[name] * keep
        if name in under_sparsity:
            weights[name + "_mask"] = keep
    weights.update(load_file(job["adapter"]) if job["adapter"] else {})
    cstorch.save({"model": {"model." + name: tensor for name, tensor in weights.items()}}, path)


def check_fits(start, model):
    """Raise `ValueError` unless a checkpoint has the model's tensors. A lowering or compile would not load it."""
    found = {name: tuple(tensor.shape) for name, tensor in loaded(start)["model"].items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
    if wrong:
        raise ValueError("the start must have the tensors of the model, it differs in " + ", ".join(wrong[:5]))


def write_resumed(job, start, folder):
    """A checkpoint of what was trained, with the frozen weights beside it again."""
    state = loaded(job["restart"]["checkpoint"])
    state["model"] = {**loaded(start)["model"], **state["model"]}
    cstorch.save(state, str(folder / "resumed.mdl"))
    return str(folder / "resumed.mdl")


def loaded(path):
    """A Cerebras checkpoint. cstorch unpickles, and so runs, what is not HDF5."""
    if not h5py.is_hdf5(path):
        raise ValueError("a Cerebras checkpoint must be HDF5, " + path + " is not. Remove it: it is made again.")
    return cstorch.load(path, map_location="cpu")


def keep_masks(job):
    """Each pruned weight with which of its elements stay, from packed bits; all of them where no bits are given."""
    if not job["masks"]:  # only the graph is wanted
        return ((name, torch.ones(job["shapes"][name], dtype=torch.bool)) for name in job["shapes"])
    packed = load_file(job["masks"])
    return ((name, unpacked(bits, job["shapes"][name])) for name, bits in packed.items())


def unpacked(bits, shape):
    places = torch.arange(7, -1, -1, dtype=torch.uint8)
    return ((bits[:, None] >> places) & 1).flatten()[: shape[0] * shape[1]].view(*shape).bool()


def write_trained(job, folder, trainer):
    """Write what was trained; returns how many steps were, and which weights changed though they are frozen."""
    steps = max(json.loads(line)["step"] for line in (folder / "metrics.jsonl").open())
    if (folder / "stop").exists():
        return {"steps": steps, "stopped": True}
    path = str(folder / "model_dir" / f"checkpoint_{job['steps']}.mdl")
    trained = loaded(path)["model"]
    start = loaded(str(folder / "start.mdl"))["model"]
    if job["trains"] == "adapters":
        names = [name for name in trained if name.endswith(("lora_A", "lora_B"))]
    else:
        names = ["model." + name for name in job["shapes"]]
    saved = {name[len("model.") :]: torch.tensor(trained[name].float().numpy()) for name in names}
    save_file(saved, str(folder / "trained.safetensors"))
    masks = ended_masks(job, trained)
    if job["changes"]:
        save_file(masks, str(folder / "trained_masks.safetensors"))
    # What is frozen on a wafer is not asked back: no optimizer has it.
    ended = {**start, **(trainer.model.state_dict() if job["target"] == "cpu" else {}), **trained}
    may_change = {*names, *("model." + name + "_mask" for name in masks if job["changes"])}
    changed = [name for name in start if name not in may_change and not torch.equal(ended[name], start[name])]
    return {"steps": steps, "changed": sorted(changed), "zeros": count_zeros(job, ended, masks)}


def ended_masks(job, trained):
    """{pruned weight: which of its elements are kept at the end}"""
    if not job["changes"]:
        return {name: keep for name, keep in keep_masks(job) if name in job["pruned"]}
    return {name: torch.tensor(trained["model." + name + "_mask"].numpy()).bool() for name in job["pruned"]}


def count_zeros(job, trained, masks):
    """{pruned weight: its zeros}; of a trained one, those among its pruned elements."""
    if job["trains"] == "adapters":
        return {name: int((trained["model." + name] == 0).sum()) for name in job["pruned"]}
    return {name: int((trained["model." + name][~keep] == 0).sum()) for name, keep in masks.items()}


def lowered(folder):
    """Count what the compiler's front end made of the model."""
    files = list((folder / "model_dir").rglob("cirh.mlir"))
    text = "".join(path.read_text(errors="replace") for path in files)
    return {
        "cirh_files": len(files),
        "cirh_bytes": len(text),
        "cirh_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sparsity_annotations": text.count("cs.sparsity"),
    }


def write_json(path, value):
    partial = path.with_name("." + path.name)
    partial.write_text(json.dumps(value))
    partial.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # the appliance client's threads may not end by themselves
