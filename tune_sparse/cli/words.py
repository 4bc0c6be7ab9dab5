"""Parts of a help: the project's own words, and lists of models, tasks, methods, modes, schedules, presets and
settings."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from search_spaces import matrix, subadapters
from search_spaces.matrix import TOY_MODELS
from tune_sparse.config import Protocol, ScheduleSettings
from tune_sparse.config.options import describe_option, value_text
from tune_sparse.config.presets import DEFAULT_PRESET
from tune_sparse.data.task_types import AnswerTask, ChoiceTask, Task, TextTask
from tune_sparse.data.tasks import TASKS
from tune_sparse.models.from_scratch import FROM_SCRATCH
from tune_sparse.modes import MODES
from tune_sparse.pruning.methods import ALLOCATIONS, METHODS, PATTERNS
from tune_sparse.pruning.scores import SCORES
from tune_sparse.schedules import SCHEDULES

WIDTH = 100
"""Columns of a help."""
SETTINGS = tuple(f.name for f in fields(Protocol))
SCHEDULE_SETTINGS = tuple(f.name for f in fields(ScheduleSettings))

WORDS = {
    "sparsity": "the fraction of pruned weights, which are set to zero",
    "mask": "says of every weight of a matrix whether it is kept (1) or pruned (0)",
    "example": "one item of a dataset. Training examples train a model, selection examples are held out to choose "
    "between models, test examples give the final score",
    "calibration": "measuring the model on a few examples, for the pruning methods that need data",
    "cell": "one combination of model, task, method, sparsity, mode, schedule, seed and backend. Cells whose training "
    "is the same share one run: at sparsity 0 nothing is pruned, so all methods share a run, and all modes that train "
    "LoRA do, too",
    "run": "pruning, training and scoring a model once. RUN is the name of its folder in RESULTS/runs: look there, as "
    "it ends in a hash of your settings. It begins with backend, model, task, method, sNN for a sparsity of NN "
    "percent, and mode, with the schedule where masks change. At sparsity 0 its method is none, and its mode is dense "
    "wherever LoRA is trained",
    "method": "a rule that chooses the weights to prune, such as wanda; none if nothing is pruned",
    "mode": "a way to train: dense, LoRA on the unpruned model; sparse-to-dense, LoRA on the pruned model, whose "
    "pruned weights are set to zero again after training; sparse-to-sparse, the same, but they stay zero in every "
    "step; masked-finetuning (not in a search), no LoRA: the kept weights are trained themselves",
    "backend": "the program that trains: torch on a CPU or GPU, or cerebras with the software of the company Cerebras",
    "trial": "the pruning, training and scoring of one model (a run) while it executes; several can do so at the same "
    "time",
    "adapter": "LoRA: two small matrices beside a large one, trained in its place and merged into it afterwards. A "
    "sweep puts one on the q, k, v, o, gate, up and down projection of every layer; a search puts them on the "
    "matrices that its option --space names",
    "super-adapter": "a LoRA adapter that is trained so that it works at many ranks",
    "sub-adapter": "a part of a super-adapter: a chosen rank for each group of matrices in each layer",
    "candidate": "a sub-adapter that a search scores",
    "results folder": "RESULTS, which holds all that commands record: runs/ has a folder for each run (a model that "
    "was pruned, trained and scored), sweeps/ a file for each sweep, searches/, throughput/ and evaluations/ what "
    "those commands measured, analysis/ the report, mlflow.db the data of `tune-sparse ui`",
    "audit": "checks the records, which are the files in RESULTS/runs and RESULTS/sweeps: whether pruned weights are "
    "zero, whether two settings gave the very same result, whether runs that are compared differ in code, data, "
    "prompts or version of the model, and more. An error means that a result cannot be trusted, a warning that it "
    "needs a look",
    "structured": "pruned by whole attention heads and feed-forward channels, so that matrices can become smaller",
    "published numbers": "results of papers, built in or in CSV files, that are shown beside yours",
    "Ray": "the program that distributes work over CPU cores, GPUs and machines. If the variable RAY_ADDRESS has the "
    "HOST:PORT of a running cluster, that one is used, or else Ray is started on this machine alone",
    "CS-3": "a computer for machine learning by the company Cerebras; the Cerebras software drives it",
    "MLflow": "a program that stores results of experiments and shows them in a browser",
}
"""The project's words, each in the help that uses it."""

RUN_WORDS = ("run", "method", "mode", "backend")
"""What the name of a run is made of."""

BASELINE_COLUMNS = {
    "source, address": "the paper or page, and its address, which begins with https://",
    "table": "where in the source the number is",
    "kind": "printed, restated (by a third party), user run (of the published code) or digitised (off a picture)",
    "model": "the Hugging Face id without ORG/; an unknown name is refused with a list of all",
    "task": "a task of `tune-sparse sweep --help`, or aqua, siqa, mmlu, truthfulqa or c4",
    "method, tuning": "how the model was pruned and trained, in the words of the source",
    "training": "what it was trained on before it was scored: none, task (its own training examples) or other",
    "mode": "a mode of `tune-sparse sweep --help`",
    "sparsity": "from 0 to below 1",
    "num_fewshot": "solved examples in a prompt",
    "context_tokens": "tokens of a window of a perplexity",
    "metric": "such as acc, acc_norm, exact_match_strict, exact_match_flexible (fractions) or perplexity; an unknown "
    "name is refused with a list of all",
    "value": "the number",
    "hardware, notes": "for readers",
}
"""The columns of a file of published numbers, in their order."""

SETTINGS_IN_USE = "The settings that a run has used are in RESULTS/runs/RUN/config.yaml."


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


def models(*, trains: bool, downloads: bool, classes: str = "Llama, Mistral, GPT-2 or OPT") -> str:
    """The kinds of models.

    trains, downloads: the command itself makes a toy model, or fetches one of the Hub, where it is missing.
    """
    trained = "is trained from scratch if missing" if trains else "must have been trained by `tune-sparse prepare`"
    fetched = "is downloaded if missing" if downloads else "must have been downloaded by `tune-sparse prepare`"
    kinds = {
        "toy models": f"{' and '.join(TOY_MODELS)}: very small; each {trained}, which takes about a minute",
        "models from scratch": f"{' and '.join(FROM_SCRATCH)}: a GPT-2 of random weights that reads bytes, to be "
        "trained whole by masked-finetuning with train_also; or random:FOLDER for the config and tokenizer of a folder",
        "folders": f"a checkpoint of class {classes} in Hugging Face format with safetensors weights, such as "
        "./my-llama",
        "Cerebras checkpoints": "a file such as ./run/checkpoint_100.mdl, with the model's config.json of Hugging Face "
        "or params.yaml of Model Zoo beside it, and its tokenizer's files",
        "Hugging Face ids": f"ORG/NAME@REVISION, or ORG/NAME for its main branch; {fetched}",
    }
    return table("models", kinds)


def presets(note: str = "") -> str:
    """The presets with all that they set. note: what else a command says of them."""
    rows = {name: f"{about}{_sets(name)}" for name, about in matrix.ABOUT.items()}
    always = (
        f"Without the name of a preset, {DEFAULT_PRESET} is used where no model is given or only toy models are, and "
        "for any other model no preset: then all defaults that this help shows hold. What a preset sets takes the "
        "place of these defaults, and what you give takes the place of both; all else keeps the defaults of "
        "`tune-sparse sweep --help`. A model that is not a toy model never gets generated examples from a preset: only "
        "--data-dir synthetic gives it some. gpus_per_trial=none does not mean that no GPU is used: as many trainings "
        "share each GPU as fit into its memory. "
    )
    return f"{table('presets', rows)}\n\n{paragraph(always + note)}"


def _sets(name: str) -> str:
    """The names and values of a preset, against toy where it begins with that."""
    if name not in matrix.PRESETS or name == "pilot":
        return ""
    values, toy = matrix.PRESETS[name], matrix.PRESETS[DEFAULT_PRESET]
    is_like_toy = name != DEFAULT_PRESET and toy.keys() <= values.keys()
    shown = {key: value for key, value in values.items() if not is_like_toy or toy.get(key) != value}
    return f". Sets {f'what {DEFAULT_PRESET} sets, but ' if is_like_toy else ''}{assigned(shown)}"


def assigned(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value_text(value)}" for name, value in settings.items())


def tasks(names: Collection[str] = tuple(TASKS)) -> str:
    """The tasks with their dataset, its fields, and the split whose examples are the test examples."""
    kinds = {
        ChoiceTask: "accuracy of the likeliest choice",
        AnswerTask: "accuracy of a generated answer",
        TextTask: "perplexity",
    }
    rows = {name: f"{TASKS[name].about}; {kinds[type(TASKS[name])]}. {_dataset(TASKS[name])}" for name in names}
    return table("tasks", rows)


def metrics() -> str:
    """The metric that each task is judged by with the reason, and those beside it."""
    rows = {}
    for name, task in TASKS.items():
        beside = " and ".join(metric for metric in task.metrics if metric != task.primary_metric)
        rows[name] = f"{task.primary_metric}: {task.why_primary}{f'. Beside it: {beside}' if beside else ''}"
    note = "A mixture has the mean of those of its tasks. Names are those of lm-evaluation-harness."
    return f"{table('metrics that tasks are judged by', rows)}\n\n{paragraph(note)}"


def _dataset(task: Task) -> str:
    hub, fields = "none on the Hub", ", ".join(task.fields)
    if task.hub:
        hub = f"{task.hub.path}{f' (configuration {task.hub.config})' if task.hub.config else ''}"
    if isinstance(task, TextTask):
        return f"Dataset: {hub}"
    return f"Dataset: {hub}; fields {fields}; test examples: {task.test_split}"


def files() -> str:
    """The files of a folder with examples, and what the other two sources have."""
    rows = {
        "TASK/train.jsonl": "training examples",
        "TASK/validation.jsonl": "needed where the list of tasks has `test examples: validation`; elsewhere optional: "
        "without it the selection examples are taken out of train.jsonl",
        "TASK/test.jsonl": "needed where the list of tasks has `test examples: test`",
        "wikitext2": "the files train.txt, valid.txt and test.txt",
        "tinyshakespeare": "the file input.txt: 90% for training, 5% for selection, 5% for the test (`tune-sparse "
        "search` does not take it)",
    }
    return f"{table('files in DATA, the folder of --data-dir', rows)}\n\n" + paragraph(
        "A .jsonl file has a JSON object with the fields of the task in each line. The examples of the texts wikitext2 "
        "and tinyshakespeare are pieces of the text, all with the same number of tokens. `--data-dir hub` has the "
        "tasks whose dataset is on the Hub. `--data-dir synthetic` has boolq, hellaswag and gsm8k."
    )


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
    own = {
        "unstructured": "magnitude without an ending; write unstructured, as magnitude alone is refused",
        "structured": "magnitude with -structured; write structured, as magnitude-structured is refused",
    }
    listed = textwrap.fill(", ".join(METHODS), WIDTH - 4, break_on_hyphens=False)
    return "\n\n".join(
        [
            table("methods are named by a score, which says what is pruned", scores | own),
            table("a method may end in", {f"-{name}": text for name, text in parts.items()}),
            paragraph(
                "A method without such an ending, except structured, prunes single weights, the same fraction of each "
                "matrix."
            ),
            f"all methods:\n{textwrap.indent(listed, '    ')}",
        ]
    )


def modes(names: Collection[str] = tuple(MODES)) -> str:
    return table("modes", {name: MODES[name].about for name in names})


def schedules() -> str:
    note = (
        "All but one-shot are for the mode masked-finetuning alone. Each reads the settings that name it below. "
        "gradual, set and rigl need a method that prunes single weights, gradual one that does so by magnitude."
    )
    return f"{table('schedules', {name: facts.about for name, facts in SCHEDULES.items()})}\n\n{paragraph(note)}"


def baselines() -> str:
    return f"{table('columns of a CSV file of published numbers', BASELINE_COLUMNS)}\n\n" + paragraph(
        "Each must be there. A field that the source does not state is empty; source, address, kind, model and metric "
        "must not be."
    )


def spaces() -> str:
    return table("search spaces", subadapters.ABOUT)


def settings(
    names: Collection[str] = SETTINGS,
    heading: str = "",
    texts: Mapping[str, str] | None = None,
) -> str:
    """The named settings under their headings, or under one.

    texts: {name: its text}, where a command has another one than the field.
    """
    declared = (*fields(Protocol), *fields(ScheduleSettings))
    shown = [f.name for f in declared if f.name in names]
    width = max(map(len, shown))
    groups: dict[str, dict[str, str]] = {}
    current = ""
    for f in declared:
        current = f.metadata["heading"] or current
        if f.name in shown:
            text = (texts or {}).get(f.name) or describe_option(f)
            groups.setdefault(heading or current, {})[f"{f.name:{width}}"] = text
    return "\n\n".join(table(f"settings for --set, {title}", rows) for title, rows in groups.items())
