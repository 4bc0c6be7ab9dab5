"""Parts of a help: the project's own words, and lists of models, tasks, methods, modes, presets and settings."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import fields

from search_spaces import matrix, subadapters
from tune_sparse.config import Protocol
from tune_sparse.config.options import describe_option
from tune_sparse.data.task_types import AnswerTask, ChoiceTask, TextTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.modes import MODES
from tune_sparse.pruning.methods import ALLOCATIONS, METHODS, PATTERNS
from tune_sparse.pruning.scores import SCORES

WIDTH = 100
"""Columns of a help."""
TOY_MODELS: tuple[str, ...] = matrix.PRESETS["toy"]["models"]

WORDS = {
    "sparsity": "the fraction of pruned weights, which are set to zero",
    "mask": "says of every weight of a matrix whether it is kept (1) or pruned (0)",
    "dense": "without pruning: sparsity 0",
    "example": "one item of a dataset. Training examples train a model, selection examples are held out to choose "
    "between models, test examples give the final score",
    "calibration": "measuring the model on a few examples, for the pruning methods that need data",
    "cell": "one combination of model, task, method, sparsity, mode, seed and backend. Cells that train the same share "
    "a run: at sparsity 0 all methods and modes of a model and task",
    "run": "pruning, training and scoring a model once. RUN is the name of its folder in DIR/runs: backend, model, "
    "task, method, sNN for a sparsity of NN percent, mode, and a hash of all settings",
    "trial": "a run while it executes, as one of several at the same time",
    "adapter": "LoRA: two small matrices for each large one, trained in its place and merged into it afterwards",
    "super-adapter": "a LoRA adapter that is trained so that it works at many ranks",
    "sub-adapter": "a part of a super-adapter: a chosen rank for each group of matrices in each layer",
    "candidate": "a sub-adapter that a search scores",
    "results folder": "holds all that sweeps record: runs/ has a folder for each run, sweeps/ a file for each sweep, "
    "analysis/ the report, mlflow.db the data of `tune-sparse ui`",
    "audit": "checks records against each other. An error means that a result cannot be trusted, a warning that it "
    "needs a look",
    "structured": "pruned by whole attention heads and feed-forward channels, so that matrices can become smaller",
    "published numbers": "results of papers, built in or in CSV files, that are shown beside yours",
    "Ray": "the program that distributes work over CPU cores, GPUs and machines",
    "CS-3": "a computer for machine learning by the company Cerebras, which sells its software with it",
    "MLflow": "a program that stores results of experiments and shows them in a browser",
}
"""The project's words, each in the help that uses it."""


def table(heading: str, rows: Mapping[str, str]) -> str:
    """Rows of a name and a text, aligned and within `WIDTH` columns, under a heading."""
    width = max(map(len, rows)) + 2
    lines = [f"{heading}:"]
    for name, text in rows.items():
        wrapped = textwrap.wrap(text, WIDTH - 4 - width, break_long_words=False, break_on_hyphens=False)
        lines += [f"    {name if line is wrapped[0] else '':{width}}{line}" for line in wrapped]
    return "\n".join(lines)


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def words(*names: str) -> str:
    return table("words", {name: WORDS[name] for name in names})


def models() -> str:
    kinds = {
        "toy models": f"{' and '.join(TOY_MODELS)}: very small, trained from scratch in about a minute when first used",
        "folders": "a checkpoint in Hugging Face format with safetensors weights, such as ./my-llama",
        "Hugging Face ids": "ORG/NAME@REVISION, downloaded beforehand by `tune-sparse prepare`",
    }
    return table("models", kinds)


def presets() -> str:
    return table("presets", matrix.ABOUT)


def tasks() -> str:
    kinds = {
        ChoiceTask: "accuracy of the likeliest choice",
        AnswerTask: "accuracy of a generated answer",
        TextTask: "perplexity",
    }
    return table("tasks", {name: f"{task.about}; {kinds[type(task)]}" for name, task in TASKS.items()})


def methods() -> str:
    """The methods by their parts, and all names."""
    needing = {name for name, score in SCORES.items() if score.needs.input_norms or score.needs.gradients}
    needing |= {name for name, score in SCORES.items() if score.needs.hessian}
    scores = {
        name: f"{score.about}{'; needs calibration' if name in needing else ''}" for name, score in SCORES.items()
    }
    parts = {name: text for name, text in ALLOCATIONS.items() if name != "uniform"}
    parts["owl"] += "; needs calibration"
    parts |= {name: text for name, text in PATTERNS.items() if name != "element-wise"}
    own = {"unstructured": "the name of magnitude alone", "structured": "the name of magnitude-structured"}
    listed = textwrap.fill(", ".join(METHODS), WIDTH - 4, break_on_hyphens=False)
    return "\n\n".join(
        [
            table("methods are named by a score, which says what is pruned", scores | own),
            table("a method may end in", {f"-{name}": text for name, text in parts.items()}),
            "Without such an ending single weights are pruned, the same fraction of each matrix.",
            f"all methods:\n{textwrap.indent(listed, '    ')}",
        ]
    )


def modes() -> str:
    return table("modes", {name: mode.about for name, mode in MODES.items()})


def spaces() -> str:
    return table("search spaces", subadapters.ABOUT)


def settings(names: Collection[str] | None = None) -> str:
    """The settings of training and scoring under their headings, or some of them under one."""
    shown = [f for f in fields(Protocol) if names is None or f.name in names]
    width = max(len(f.name) for f in shown)
    groups: dict[str, dict[str, str]] = {}
    heading = ""
    for f in shown:
        heading = (f.metadata["heading"] or heading) if names is None else "scoring"
        groups.setdefault(heading, {})[f"{f.name:{width}}"] = describe_option(f)
    return "\n\n".join(table(f"settings for --set, {heading}", rows) for heading, rows in groups.items())
