"""Published numbers as CSV: one number a line, with source, address, and how it was come by.

    source,address,table,kind,model,task,method,tuning,training,mode,sparsity,num_fewshot,context_tokens,metric,value,
    hardware,notes

An empty field was not stated by the source. A line without a value stands for a number that nobody has entered yet.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError, unknown_name
from tune_sparse.modes import MODES

FOLDER = Path(__file__).parent
BUILT_IN = (FOLDER / "phoenix.csv", FOLDER / "published.csv", FOLDER / "cs3_rates.csv")
KINDS = {
    "printed": "read where its authors published it",
    "restated": "read where a third party repeats it",
    "user run": "measured by a user of the published code",
    "digitised": "read off a picture",
    "log": "read from the public log of a run",
    "unofficial": "published by users without a log, among numbers that are marked as estimated or that were changed",
}
TRAININGS = {
    "none": "pruned or dense, and not trained: ours stands beside it before tuning",
    "task": "trained on the training examples of the task that was scored, as ours are",
    "other": "trained on something else, such as instructions or plain text",
}
"""What a model was trained on between its pruning and its score."""
MODELS = (
    *("llama-7b", "llama-13b", "Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf"),
    *("Meta-Llama-3-8B", "Llama-3.1-8B", "Llama-3.2-3B-Instruct", "LLaMA (version not printed)"),
    *("Mistral-7B-v0.1", "Mistral-7B-v0.3", "Mixtral-8x7B-v0.1", "mpt-7b", "SmolLM-1.7B-Instruct"),
    *("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "opt-175b"),
    *("bloom-560m", "bloom-1b1", "bloom-1b7", "bloom-3b", "bloom-7b1"),
    *("GPT-3 1.3B", "GPT-3 XL 1.3B", "GPT 6.7B", "(one kernel)"),
    "nanoGPT characters (6 layers, 6 heads, 384 wide)",
)
"""Names as the last part of a hub id, where the Hub has the model."""
OTHER_TASKS = ("aqua", "siqa", "mmlu", "truthfulqa", "c4")
"""Tasks of published numbers that no run of ours has."""


@dataclass(frozen=True)
class Metric:
    """The range of a published number, and whether a run of ours has the same."""

    highest: float
    incomparable: str | None = None
    """Why no number of ours means the same; None where one does."""


RATE = "train_examples_per_second"
_EFFICIENCY = "a figure of merit against the source's own baseline"
METRICS = {
    **dict.fromkeys(("acc", "acc_norm", "exact_match_strict", "exact_match_flexible", "f1"), Metric(1.0)),
    "perplexity": Metric(math.inf),
    "acc_generated": Metric(1.0, "scored by generated choices, ours by their likelihoods"),
    "acc_mean_of_tasks": Metric(1.0, "a mean over tasks, of a model that was quantised too"),
    "acc_norm_or_plain": Metric(1.0, "a mean of length-normalised and plain accuracies"),
    "acc_unstated_variant": Metric(1.0, "the source does not say whether accuracy is length-normalised"),
    "exact_match_last_number": Metric(1.0, "scored by the last number of an answer to another prompt"),
    "exact_match_unstated_filter": Metric(1.0, "the source does not say whether its match is strict or flexible"),
    "perplexity_llama_cpp": Metric(math.inf, "llama.cpp scores the second half of each window alone"),
    "loss_nats_per_character": Metric(math.inf, "a loss of each character, ours of each token"),
    "actual_sparsity": Metric(1.0, "a sparsity after a merge that does not keep zeros"),
    "train_seconds": Metric(math.inf, "seconds on other hardware"),
    RATE: Metric(math.inf, "a rate at another batch size and length: it stands in the hardware comparison"),
    "peak_memory_bytes": Metric(math.inf, "memory of another program"),
    "peak_memory_bytes_at_least": Metric(math.inf, "memory of another program"),
    "nonzero_weights": Metric(math.inf, "a size, not a measurement"),
    **{
        f"inference_flops{tokens}": Metric(math.inf, "the source does not say which model and sparsity were counted")
        for tokens in ("", "_1024", "_2048", "_4096", "_8192")
    },
    **{
        name: Metric(math.inf, _EFFICIENCY)
        for name in (
            *("speedup", "speedup_at_most", "flops_reduction", "weights_reduction"),
            *("accuracy_relative_to_lora", "accuracy_increase", "perplexity_improvement"),
        )
    },
    "flops_saved_fraction": Metric(1.0, _EFFICIENCY),
}


@dataclass(frozen=True)
class Published:
    """One published number. Texts are empty, numbers None, where the source does not state them."""

    source: str
    address: str
    table: str
    kind: str
    model: str
    task: str
    method: str
    tuning: str
    training: str
    """a key of `TRAININGS`, or empty"""
    mode: str
    sparsity: float | None
    num_fewshot: int | None
    context_tokens: int | None
    """of the windows that a perplexity was measured on"""
    metric: str
    value: float | None
    hardware: str
    notes: str


COLUMNS = tuple(field.name for field in fields(Published))
NUMBERS: dict[str, Callable[[str], Any]] = {
    "sparsity": float,
    "num_fewshot": int,
    "context_tokens": int,
    "value": float,
}


def load_published(paths: Iterable[Path] = (), models: Iterable[str] = ()) -> list[Published]:
    """The built-in numbers and those of further files; `models` are names known besides `MODELS`.

    A line without a value is dropped where another has it. Raises `InputError` with line and rule.
    """
    known = {*MODELS, *models}
    rows = [row for path in (*BUILT_IN, *paths) for row in read_published(path, known)]
    entered = {_place(row) for row in rows if row.value is not None}
    return [row for row in dict.fromkeys(rows) if row.value is not None or _place(row) not in entered]


def _place(row: Published) -> tuple[str, ...]:
    """What a line without a value waits for, whatever its metric."""
    return row.address, row.model, row.task


def read_published(path: Path, models: Iterable[str] = MODELS) -> list[Published]:
    """One file. Raises `InputError` with the line, the rule, the value and the fix."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _check_header(path, header)
            return [_published(f"{path}, line {reader.line_num}", header, row, models) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"published numbers must be a CSV file in UTF-8, {path} is not: {error}. Fix it.") from error


def _check_header(path: Path, header: Sequence[str]) -> None:
    for name in header:
        if name not in COLUMNS:
            raise InputError(f"{path}, line 1: {unknown_name('column', name, COLUMNS)}")
    if sorted(header) != sorted(COLUMNS):
        missing = ", ".join(name for name in COLUMNS if name not in header) or "none"
        raise InputError(f"{path}, line 1: each column must be there once, missing: {missing}. Add it, or copy a file.")


def _published(place: str, header: Sequence[str], row: Sequence[str], models: Iterable[str]) -> Published:
    try:
        if len(row) != len(header):
            raise InputError(f"a line needs {len(header)} fields, got {len(row)}. Quote a text that has commas.")
        texts = {name: text.strip() for name, text in zip(header, row, strict=True)}
        found = Published(**texts | {name: _number(name, texts[name]) for name in NUMBERS})
        _check(found, models)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    return found


def _number(name: str, text: str) -> Any:
    try:
        return NUMBERS[name](text) if text else None
    except ValueError as error:
        whole = "a whole number" if NUMBERS[name] is int else "a number"
        raise InputError(f"{name} must be {whole} or empty, got {text!r}. Write 0.5, not 50%.") from error


def _check(row: Published, models: Iterable[str]) -> None:
    for name in ("source", "address", "model"):
        if not getattr(row, name):
            raise InputError(f"{name} must be stated, got ''. A number without it cannot be traced.")
    if not row.address.startswith(("https://", "http://")):
        raise InputError(f"an address must begin with https://, got {row.address!r}. Give the page of the source.")
    if row.kind not in KINDS:
        raise unknown_name("kind", row.kind, KINDS)
    if row.model.lower() not in {model.lower() for model in models}:
        raise unknown_name("model", row.model, models)
    for task in filter(None, row.task.split("+")):
        if task not in TASKS and task not in OTHER_TASKS:
            raise unknown_name("task", task, [*TASKS, *OTHER_TASKS])
    if row.training and row.training not in TRAININGS:
        raise unknown_name("training", row.training, TRAININGS)
    if row.mode and row.mode not in MODES:
        raise unknown_name("mode", row.mode, MODES)
    if row.metric not in METRICS:
        raise unknown_name("metric", row.metric, METRICS)
    _check_range("sparsity", row.sparsity, 1.0, below=True)
    _check_range("num_fewshot", row.num_fewshot, math.inf)
    _check_range("context_tokens", row.context_tokens, math.inf)
    _check_range(row.metric, row.value, METRICS[row.metric].highest)


def _check_range(name: str, value: float | None, highest: float, below: bool = False) -> None:
    if value is None or (math.isfinite(value) and value >= 0 and (value < highest if below else value <= highest)):
        return
    limits = f"in [0, {highest:g}{')' if below else ']'}" if math.isfinite(highest) else "finite and at least 0"
    hint = f"Did you mean {value / 100:g}?" if highest < value <= 100 else "Fix the value."
    raise InputError(f"{name} must be {limits}, got {value:g}. {hint}")


SETTING = (
    *("model", "task", "method", "tuning", "training", "mode"),
    *("sparsity", "num_fewshot", "context_tokens", "hardware"),
)
SOURCE = ("source", "address", "table", "kind")


def our_metric(row: Published) -> str:
    """The name that a run of ours gives to the same number."""
    return f"{row.metric}_before_tuning" if row.training == "none" else row.metric


def find_conflicts(rows: Iterable[Published]) -> dict[Published, list[Published]]:
    """{a number: others that tables of the same source print for the same setting}, where they differ."""
    by_setting: dict[tuple[Any, ...], list[Published]] = {}
    for row in rows:
        setting = tuple(getattr(row, name) for name in ("source", "address", "metric", *SETTING))
        by_setting.setdefault(setting, []).append(row)
    found = {
        row: [other for other in same if other.table != row.table and other.value not in (None, row.value)]
        for same in by_setting.values()
        for row in same
        if row.value is not None
    }
    return {row: others for row, others in found.items() if others}


@dataclass(frozen=True)
class PublishedRun:
    """The numbers of one source about one setting, named as the parameters and metrics of our runs are."""

    name: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    @property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def as_runs(rows: Iterable[Published]) -> list[PublishedRun]:
    """Gather the numbers that have a value by source and setting; a metric that is published twice makes two runs.

    The parameter `backend`, which says where a run of ours computed, is `published`.
    """
    gathered: dict[tuple[Any, ...], list[Published]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        if row.value is not None:
            key = tuple(getattr(row, name) for name in (*SETTING, *SOURCE))
            gathered.setdefault((*key, seen[*key, row.metric]), []).append(row)
            seen[*key, row.metric] += 1
    return [_as_run(rows) for rows in gathered.values()]


def _as_run(rows: Sequence[Published]) -> PublishedRun:
    stated = asdict(rows[0])
    params = {name: str(stated[name]) for name in SETTING if stated[name] not in ("", None)}
    where = "" if rows[0].sparsity is None else f"sparsity {rows[0].sparsity:g}"
    first = rows[0]
    described = (first.tuning, first.method, first.model, first.task, where, first.hardware, first.source)
    notes = " | ".join(dict.fromkeys(row.notes for row in rows if row.notes))
    return PublishedRun(
        name=f"PUBLISHED ({stated['kind']}) " + ", ".join(part for part in described if part and part != "none"),
        params=params | {"backend": "published"},
        metrics={our_metric(row): row.value for row in rows if row.value is not None},
        tags={name: stated[name] for name in SOURCE if stated[name]} | ({"notes": notes} if notes else {}),
    )
