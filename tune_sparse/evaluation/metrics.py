"""Metrics of scored examples under lm-evaluation-harness' names, each with its standard error.

A record holds every metric of its task. `accuracy` is the primary one among them, which a reader may choose again:
`accuracy_stderr`, `accuracy_before_tuning` and `accuracy_before_merge` go with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tune_sparse.data.task_types import METRICS, ChoiceTask, Task, TextTask
from tune_sparse.errors import InputError, RunError
from tune_sparse.evaluation.outcomes import Outcome

Metrics = dict[str, Any]
MEAN = "mean"
"""The primary metric of a mixture: the mean of those of its tasks."""
SUFFIXES = ("", "_stderr", "_before_tuning", "_before_merge")
"""After a metric's name: its value, its standard error, and its value at earlier states of the model."""
MEANS = ("accuracy", "accuracy_before_tuning", "accuracy_before_merge")
MEANS_WHERE_KNOWN = ("chance_accuracy", "truncated_fraction", "cut_fraction")


def compute_metrics(task: Task, outcomes: Sequence[Outcome], bytes_per_token: float | None = None) -> Metrics:
    """The metrics of one task, with what one needs to judge them. bytes_per_token: of a text, where it is known."""
    if isinstance(task, TextTask):
        return judged(_perplexity(outcomes, bytes_per_token), task.primary_metric)
    golds, predictions = Counter(o.gold for o in outcomes), Counter(o.predicted for o in outcomes)
    found: Metrics = {
        "chance_accuracy": task.chance,
        "n_examples": len(outcomes),
        "truncated_fraction": _fraction(o.truncated for o in outcomes),
        "cut_fraction": _fraction(o.cut for o in outcomes),
        "majority_fraction": golds.most_common(1)[0][1] / len(outcomes),
        "most_frequent_fraction": predictions.most_common(1)[0][1] / len(outcomes),
    }
    for name in task.metrics:
        right = [float(o.is_right(name)) for o in outcomes]
        found |= {name: mean_known(right), f"{name}_stderr": standard_error(right)}
    if isinstance(task, ChoiceTask) and task.yes is not None:
        found |= _f1(outcomes, str(task.yes))
    return judged(found, task.primary_metric)


def judged(metrics: Metrics, primary: str) -> Metrics:
    """The metrics of a task with `accuracy`, and all that goes with it, by the metric `primary`.

    Raises `InputError` where it was not recorded.
    """
    if primary not in metrics:
        known = ", ".join(name for name in METRICS if name in metrics) or "none"
        raise InputError(f"a primary metric must be in the record, got {primary} of {known}. Run it again.")
    by_primary = {f"accuracy{s}": metrics[primary + s] for s in SUFFIXES if primary + s in metrics}
    return metrics | {"primary_metric": primary} | ({} if primary == "perplexity" else by_primary)


def judged_again(metrics: Metrics, task: str, chosen: Mapping[str, str]) -> Metrics:
    """The metrics of a record with `accuracy` by the primary metrics that are chosen, {task: metric}."""
    by_task = metrics_by_task(metrics, task)
    if not chosen.keys() & by_task.keys():
        return metrics
    return metrics | combined(
        {name: judged(found, chosen.get(name, found.get("primary_metric", ""))) for name, found in by_task.items()}
    )


def metrics_by_task(metrics: Metrics, task: str) -> dict[str, Metrics]:
    """{task: its metrics} of a record on `task`, which may be a mixture."""
    return metrics.get("by_task") or {task: metrics}


def with_earlier(metrics: Metrics, before_tuning: Metrics, before_merge: Metrics | None) -> Metrics:
    """The metrics of one task, and beside each what it was earlier; None where the merge changes nothing."""
    names = [name for name in (*METRICS, "accuracy") if name in metrics]
    return (
        metrics
        | {f"{name}_before_tuning": before_tuning[name] for name in names}
        | {f"{name}_before_merge": before_merge[name] if before_merge else None for name in names}
    )


def score_name(metrics: Metrics) -> str:
    """Where a record has the value of its primary metric."""
    return "accuracy" if "accuracy" in metrics else "perplexity"


def _fraction(flags: Iterable[bool | None]) -> float | None:
    """Examples of which something holds; None where the evaluator does not say, or it cannot hold."""
    known = [float(flag) for flag in flags if flag is not None]
    return mean_known(known) if known else None


def _f1(outcomes: Sequence[Outcome], yes: str) -> Metrics:
    """2 TP / (2 TP + FP + FN), 0 where neither an example nor a prediction is positive.

    It is a ratio of means, of 2 TP and of 2 TP + FP + FN an example; its standard error is that of the ratio by the
    delta method.
    """
    positives = [float((o.gold == yes) + (o.predicted == yes)) for o in outcomes]
    hits = [2.0 * (o.gold == yes == o.predicted) for o in outcomes]
    positive = math.fsum(positives)
    f1 = math.fsum(hits) / positive if positive else 0.0
    residual = standard_error([hit - f1 * size for hit, size in zip(hits, positives, strict=True)])
    stderr = None if residual is None or not positive else residual * len(outcomes) / positive
    return {"f1": f1, "f1_stderr": stderr}


def _perplexity(windows: Sequence[Outcome], bytes_per_token: float | None) -> Metrics:
    """exp of the mean negative log-likelihood of a token, windows having equal lengths; its standard error is that of
    the mean by the delta method. Bits per byte are the same number whatever the tokenizer's tokens are."""
    losses = [-window.log_likelihoods[0] for window in windows]
    try:
        perplexity = math.exp(math.fsum(losses) / len(losses))
    except OverflowError as error:
        raise RunError(f"a perplexity must be finite, got a mean loss of {mean_known(losses):.0f}.") from error
    stderr = standard_error(losses)
    bits = {} if bytes_per_token is None else {"bits_per_byte": math.log2(perplexity) / bytes_per_token}
    return bits | {
        "perplexity": perplexity,
        "perplexity_stderr": None if stderr is None else perplexity * stderr,
        "n_examples": len(losses),
    }


def mean_known(values: Iterable[float | None]) -> float:
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean, from the sample's variance; None for a single value."""
    n, mean = len(values), math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None


def combined(by_task: Mapping[str, Metrics]) -> Metrics:
    """The metrics of a mixture: tasks count alike, however many examples they have. Those of the only task, if one."""
    if len(by_task) == 1:
        return next(iter(by_task.values()))
    every = list(by_task.values())
    stderrs = [metrics["accuracy_stderr"] for metrics in every]
    found: Metrics = {name: _mean([metrics[name] for metrics in every]) for name in MEANS if name in every[0]}
    known = {name: [m[name] for m in every if m.get(name) is not None] for name in MEANS_WHERE_KNOWN}
    return found | {
        "primary_metric": MEAN,
        "accuracy_stderr": None if None in stderrs else math.hypot(*stderrs) / len(stderrs),
        **{name: mean_known(values) if values else None for name, values in known.items()},
        "n_examples": sum(metrics["n_examples"] for metrics in every),
        "by_task": dict(by_task),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is unknown."""
    return None if None in values else mean_known(values)
