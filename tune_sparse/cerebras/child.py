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
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import cerebras.pytorch as cstorch
import h5py
import torch
import torch.nn.functional as F
import yaml
from cerebras.appliance.cluster_config import ClusterConfig
from cerebras.modelzoo.common.utils.model.lora import LoRA_Linear
from cerebras.modelzoo.models.nlp.llama.model import LlamaModel
from cerebras.modelzoo.models.nlp.mistral.model import MistralModel
from cerebras.modelzoo.trainer import Trainer
from cerebras.modelzoo.trainer.callbacks import (
    Callback,
    Checkpoint,
    KeepNCheckpoints,
    Logging,
    Lora,
    MixedPrecision,
    TrainingLoop,
)
from cerebras.modelzoo.trainer.loggers import Logger
from cerebras.pytorch.backend import current_backend_impl
from safetensors.torch import load_file, save_file

MODELS = {"llama": LlamaModel, "mistral": MistralModel}
ADAMW_EPSILON = 1e-8
"""of torch's AdamW"""
READING_THERE = {"num_workers": 8, "prefetch_factor": 10, "persistent_workers": True}
"""On the appliance's input workers, as Cerebras' own configurations read."""
REJECTED = ("norm_first", "use_ff_layer1_dropout")
"""The converter of release 2.10 writes these, and its models refuse them."""


class MaskedLoRALinear(LoRA_Linear):
    """y = (W + s(BA)⊙(W != 0)) x + b: the update reaches only weights that are not 0."""

    def forward(self, x):
        update = (self.lora_B @ self.lora_A) * self.scaling
        return F.linear(x, self.weight + update * (self.weight != 0).to(update.dtype), self.bias)


class Adapters(Lora):
    """LoRA layers in the decoder's linear layers, masked ones where the job says so."""

    def __init__(self, job):
        settings = {"r": job["rank"], "alpha": job["alpha"], "dropout": job["dropout"], "merge_weights": False}
        super().__init__({**settings, "target_modules": ["TransformerDecoderLayer", "Linear"]})
        self.is_masked = job["update_is_masked"]

    def pre_setup(self, trainer):
        super().pre_setup(trainer)
        make = trainer.callbacks["model"].model

        @functools.wraps(make)
        def masked():
            model = make()
            for module in model.modules():
                if type(module) is LoRA_Linear:
                    module.__class__ = MaskedLoRALinear
            return model

        if self.is_masked:
            trainer.callbacks["model"].model = masked


class Weights(Callback):
    """The pruned matrices themselves are trained, and nothing else."""

    def __init__(self, names):
        self.names = {"model." + name for name in names}

    def pre_setup(self, trainer):
        make = trainer.callbacks["model"].model

        @functools.wraps(make)
        def frozen():
            model = make()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in self.names)
            return model

        trainer.callbacks["model"].model = frozen

    def on_save_trainer_state(self, trainer, state_dict):
        pass

    def on_load_trainer_state(self, trainer, state_dict):
        pass


class Silent(cstorch.sparse.Static):
    """Keeps zeros without a word to the compiler."""

    def csx_annotate_sparsity(self, parameter):
        pass


class StaticSparsity(Callback):
    """Static sparsity of the pruned matrices, and of them alone: their zeros are annotated for the compiler, and kept
    where the matrices are trained.

    Model Zoo's own callback would also mask the adapters, or refuse weights that no optimizer has.
    """

    def __init__(self, job):
        self.annotated = job["annotated"]
        self.is_trained = job["trains"] == "weights"
        self.names = job["pruned"] if self.is_trained else list(self.annotated)

    def setup(self, trainer):
        if not self.names:
            return
        group = cstorch.sparse.Group()
        for name in self.names:
            kind = cstorch.sparse.Static if name in self.annotated else Silent
            algorithm = kind(sparsity=self.annotated.get(name, 0.5), init_method="from_zeros")
            group.add(functools.partial(_is_named, "model." + name), algorithm)
        trainer.model.apply(group)
        if self.is_trained:
            trainer.optimizer.apply(group)

    def on_save_trainer_state(self, trainer, state_dict):
        pass

    def on_load_trainer_state(self, trainer, state_dict):
        pass


def _is_named(wanted, name, parameter):
    return name == wanted


class Schedule(cstorch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, step i of w at (i + 1) / w of the peak, then a cosine that ends with the last step.

    Its numbers are state, as the step is, and no constants: other rates and more steps are the same graph.
    """

    def __init__(self, job, optimizer):
        self.job = job
        super().__init__(optimizer, total_iters=None)

    def _post_init(self):
        job = self.__dict__.pop("job")
        peak, final, warmup = job["learning_rate"], job["final_learning_rate"], job["warmup_steps"]
        fall = max(1, job["steps"] - 1 - warmup)
        numbers = {"warmup": warmup, "rise": peak / max(1, warmup), "final": final, "drop": peak - final, "fall": fall}
        with current_backend_impl().device:
            for name, number in {**numbers, "turn": math.pi / fall}.items():
                setattr(self, name, torch.tensor(number, dtype=torch.float32).to(self.device))
        super()._post_init()

    def _get_closed_form(self):
        step = self.last_epoch.to(torch.float32)
        fallen = torch.minimum(step - self.warmup, self.fall)
        cosine = self.final + self.drop * (fallen * self.turn).cos().add(1).mul(0.5)
        return torch.where(step < self.warmup, (step + 1) * self.rise, cosine)


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
    started = time.monotonic()
    trainer.loggers[0].write(step=0)
    trainer.fit(examples, ckpt_path=job["restart"]["checkpoint"] if job["restart"] else start)
    report = {"seconds": time.monotonic() - started, "release": cstorch.__version__}
    report["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job["target"] == "validate":
        report.update(lowered(folder))
    elif job["compile_only"]:
        report.update({"steps": 0})
    else:
        report.update(write_trained(job, folder))
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
        callbacks=[trained, StaticSparsity(job), KeepNCheckpoints(1)],
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
    return MixedPrecision(enabled=is_mixed, fp16_type="bfloat16", max_gradient_norm=job["max_grad_norm"])


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
    weights = dict(loaded(job["checkpoint"]))
    weights.setdefault("lm_head.weight", weights["embedding_layer.word_embeddings.weight"])  # where they are tied
    weights.update(load_file(job["weights"]) if job["weights"] else {})
    under_sparsity = job["pruned"] if job["trains"] == "weights" else job["annotated"]
    for name, keep in keep_masks(job):
        weights[name] = weights[name] * keep
        if name in under_sparsity:
            weights[name + "_mask"] = keep
    weights.update(load_file(job["adapter"]) if job["adapter"] else {})
    cstorch.save({"model": {"model." + name: tensor for name, tensor in weights.items()}}, path)


def loaded(path):
    """The tensors of a Cerebras checkpoint. cstorch unpickles, and so runs, what is not HDF5."""
    if not h5py.is_hdf5(path):
        raise ValueError("a Cerebras checkpoint must be HDF5, " + path + " is not. Remove it: it is made again.")
    return cstorch.load(path, map_location="cpu")["model"]


def keep_masks(job):
    """Each pruned weight with which of its elements stay, from packed bits; all of them where no bits are given."""
    if not job["masks"]:  # only the graph is wanted
        return ((name, torch.ones(job["shapes"][name], dtype=torch.bool)) for name in job["shapes"])
    packed = load_file(job["masks"])
    return ((name, unpacked(bits, job["shapes"][name])) for name, bits in packed.items())


def unpacked(bits, shape):
    places = torch.arange(7, -1, -1, dtype=torch.uint8)
    return ((bits[:, None] >> places) & 1).flatten()[: shape[0] * shape[1]].view(*shape).bool()


def write_trained(job, folder):
    """Write what was trained; returns how many steps were, and which weights changed though they are frozen."""
    steps = max(json.loads(line)["step"] for line in (folder / "metrics.jsonl").open())
    if (folder / "stop").exists():
        return {"steps": steps, "stopped": True}
    path = str(folder / "model_dir" / f"checkpoint_{job['steps']}.mdl")
    trained = loaded(path)
    start = loaded(str(folder / "start.mdl"))
    if job["trains"] == "adapters":
        names = [name for name in trained if name.endswith(("lora_A", "lora_B"))]
    else:
        names = ["model." + name for name in job["shapes"]]
    saved = {name[len("model.") :]: torch.tensor(trained[name].float().numpy()) for name in names}
    save_file(saved, str(folder / "trained.safetensors"))
    changed = [name for name in start if name not in names and not torch.equal(trained[name], start[name])]
    return {"steps": steps, "changed": sorted(changed), "zeros": count_zeros(job, trained)}


def count_zeros(job, trained):
    """{pruned weight: its zeros}; of a trained one, those among its pruned elements."""
    if job["trains"] == "adapters":
        return {name: int((trained["model." + name] == 0).sum()) for name in job["pruned"]}
    masks = keep_masks(job)
    return {name: int((trained["model." + name][~keep] == 0).sum()) for name, keep in masks if name in job["pruned"]}


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
