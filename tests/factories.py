"""Makers of runs, records and examples for tests that need a ledger but no training."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tune_sparse.config import Cell, Protocol
from tune_sparse.data.task_types import AnswerTask, PromptTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.files import write_json, write_lines
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.record import Record, SweepRecord
from tune_sparse.ledger.run import Run, readable_id, write_config

CELL = {
    "model": "tiny",
    "task": "boolq",
    "method": "unstructured",
    "sparsity": 0.5,
    "mode": "sparse-to-dense",
    "seed": 0,
    "backend": "torch",
}


TINY_PROTOCOL = Protocol(
    steps=4,
    warmup_steps=0,
    global_batch_size=4,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    lora_rank=4,
    lora_alpha=8.0,
    precision="float32",
    max_tokens=256,
    max_new_tokens=4,
    n_train=16,
    n_selection=4,
    n_test=8,
    eval_every=2,
    calibration_tokens=144,
    calibration_window=24,
)


def tiny_run(model: Path, data_dir: Path | None = None, **changes: Any) -> Run:
    """A run of seconds on a real checkpoint; `changes` are of its cell or its protocol."""
    from tune_sparse.data.splits import fingerprint_splits, load_splits
    from tune_sparse.data.tasks import tasks_named
    from tune_sparse.models.checkpoints import check_checkpoint

    cell = Cell("model", "boolq", "unstructured", 0.5, "sparse-to-sparse", 0, "torch")
    own = {name: changes.pop(name) for name in list(changes) if name in vars(cell)}
    cell, protocol = replace(cell, **own), replace(TINY_PROTOCOL, **changes)
    tasks = tasks_named(cell.task)
    return Run(
        cell=cell,
        protocol=protocol,
        model_path=str(model),
        data_dir=str(data_dir) if data_dir else None,
        model_fingerprint=check_checkpoint(str(model)).fingerprint,
        data_fingerprint=fingerprint_splits([load_splits(task, data_dir, protocol) for task in tasks]),
        prompt_version="+".join(str(task.prompt_version) for task in tasks),
    )


def finished(run: Run, ledger: Ledger, worker: Any = None) -> Record:
    """The record of a run, once it has run: on `worker`, or on one that has done nothing before."""
    from trainables.pipeline import run_cell
    from trainables.worker import WorkerCache

    steps = run_cell(run, ledger, worker or WorkerCache())
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def write_llama(
    folder: Path, tokenizer_of: Path, hidden: int, layers: int, intermediate: int, heads: int, vocabulary: int = 768
) -> None:
    """A bfloat16 Llama of random weights, made in a second per 200 million: uniform, of a usual size.

    vocabulary: rows of the embeddings; at least the 768 of the toy models' tokenizer.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tune_sparse.models.safetensors_io import TensorWriter

    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(
        **sizes, **ids, num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocabulary, dtype="bfloat16"
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for path in tokenizer_of.glob("tokenizer*"):
        shutil.copy(path, folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    numbers = np.random.Generator(np.random.SFC64(0))
    shapes = {name: (tuple(tensor.shape), torch.bfloat16) for name, tensor in tensors.items()}
    with TensorWriter(folder / "model.safetensors", shapes) as writer:
        for name, (shape, dtype) in shapes.items():
            drawn = torch.from_numpy(numbers.random(shape, dtype="float32")).sub_(0.5).mul_(0.07)
            writer.write(name, (drawn + 1 if "norm" in name else drawn).to(dtype))
        writer.done()


def make_cell(**changes: Any) -> Cell:
    return Cell(**CELL | changes)


def make_run(cell: Cell | None = None, **changes: Any) -> Run:
    """A run of `cell`; `changes` are fields of `Run`."""
    fields = {
        "protocol": Protocol(),
        "model_path": "/models/tiny",
        "data_dir": None,
        "model_fingerprint": "m" * 64,
        "data_fingerprint": "d" * 64,
        "prompt_version": "1",
    }
    return Run(cell=cell or make_cell(), **fields | changes)


def done_record(run: Run, accuracy: float = 0.75, **metrics: Any) -> Record:
    """What a finished run of this project records."""
    return Record(
        run.run_id,
        run.identity,
        "done",
        metrics={
            "accuracy": accuracy,
            "accuracy_stderr": 0.03,
            "accuracy_before_tuning": 0.5,
            "accuracy_before_merge": None if run.cell.mode == "dense" else accuracy,
            "n_examples": 200,
            "actual_sparsity": run.cell.sparsity,
            "mask_sha256": "ab" * 32,
            "train_loss": 0.25,
            "eval_loss": 0.5,
            "inference_flops": {"1024": 1_000, "2048": 2_000, "4096": 4_000, "8192": 8_000},
        }
        | metrics,
        measured={
            "trial_seconds": 3.0,
            "train_seconds": 2.0,
            "train_examples_per_second": 128.0,
            "train_tokens_per_second": 4096.0,
            "compile_seconds": None,
            "peak_memory_bytes": 1_000_000,
        },
        environment={"hardware": "abacus", "host": "here", "packages": {"torch": "2.13"}, "git_sha": None},
    )


def failed_record(run: Run, message: str = "the loss is nan at step 7", retryable: bool = False) -> Record:
    error = {"class": "RunError", "message": message, "traceback": "Traceback ...", "retryable": retryable}
    return Record(run.run_id, run.identity, "failed", error=error)


def write_run(ledger: Ledger, run: Run, record: Record) -> Path:
    """A whole run folder with a learning curve, through the ledger's own door."""
    with ledger.writing(run.run_id) as folder:
        write_config(folder, run)
        write_json(folder / "sparse_config.json", {"method": run.cell.method})
        write_json(folder / "validation_report.json", {"all_valid": True, "violations": []})
        (folder / "train.log").write_text("    0.000 began\n")
        curve = [{"step": step, "train_loss": 1 / step} for step in (1, 2, 3)]
        write_lines(folder / "metrics.jsonl", [*curve, {"step": 3, "eval_loss": 0.5}])
        write_json(folder / "result.json", asdict(record))
    return ledger.run_folder(run.run_id)


def make_sweep(cells: Iterable[Cell], started: float = 1_000.0, **run_changes: Any) -> SweepRecord:
    """A sweep that requested `cells`, each served as `tune_sparse.sweep.plan` decides."""
    rows: list[dict[str, Any]] = []
    owners: dict[str, str] = {}
    for cell in cells:
        cell_id = readable_id(cell, make_run(cell, **run_changes).identity)
        run = make_run(cell.trained, **run_changes)
        owner = owners.setdefault(run.run_id, cell_id)
        ids = {"cell_id": cell_id, "run_id": run.run_id, "pruning_id": run.pruning_id}
        rows.append(ids | {"shared_with": None if owner == cell_id else owner, **asdict(cell), "chance": 0.5})
    return SweepRecord(f"sweep{started:g}", started, {"models": ["tiny"], "protocol": {"steps": 200}}, tuple(rows))


def write_jsonl(path: Path, examples: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


def boolq_examples(count: int, prefix: str = "q") -> list[dict[str, Any]]:
    return [
        {"question": f"is {prefix} {i} odd", "passage": f"{prefix} {i} is a number.", "answer": i % 2 == 1}
        for i in range(count)
    ]


def write_boolq(data_dir: Path, train: int = 20, validation: int = 6) -> Path:
    """A folder of boolq examples, small and sound; returns `data_dir`."""
    write_jsonl(data_dir / "boolq" / "train.jsonl", boolq_examples(train, "train"))
    write_jsonl(data_dir / "boolq" / "validation.jsonl", boolq_examples(validation, "validation"))
    return data_dir


def random_tokens(count: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1, 500) for _ in range(count))


@contextmanager
def counted(module: Any, count: Callable[..., int]) -> Iterator[list[int]]:
    """`count(arguments)` of every forward pass of a module."""
    found: list[int] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(count(*args, **kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    yield found
    handle.remove()


def rows_read(input_ids: Any, **others: object) -> int:
    return len(input_ids)


def tokens_read(input_ids: Any, **others: object) -> int:
    return input_ids.numel()


def prompt_task(name: str) -> PromptTask:
    task = TASKS[name]
    assert isinstance(task, PromptTask)
    return task


def answer_task(name: str) -> AnswerTask:
    task = TASKS[name]
    assert isinstance(task, AnswerTask)
    return task
