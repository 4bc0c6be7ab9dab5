"""Metrics of scored examples, each with its standard error where there is one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from tune_sparse.errors import RunError
from tune_sparse.evaluation.outcomes import Outcome

Metrics = dict[str, float | int | None]


def compute_metrics(outcomes: Sequence[Outcome], chance: float | None, yes: str | None) -> Metrics:
    """Metrics of one task: accuracy with what one needs to judge it, or perplexity.

    chance: accuracy of guessing. yes: in yes/no tasks, the prediction that counts as positive for F1.
    """
    if outcomes[0].correct is None:
        return _perplexity(outcomes)
    golds, predictions = Counter(o.gold for o in outcomes), Counter(o.predicted for o in outcomes)
    correct = [float(bool(o.correct)) for o in outcomes]
    metrics: Metrics = {
        "accuracy": mean_known(correct),
        "accuracy_stderr": standard_error(correct),
        "chance_accuracy": chance,
        "n_examples": len(outcomes),
        "truncated_fraction": truncated_fraction(outcomes),
        "majority_fraction": golds.most_common(1)[0][1] / len(outcomes),
        "most_frequent_fraction": predictions.most_common(1)[0][1] / len(outcomes),
    }
    if outcomes[0].correct_norm is not None:
        metrics["accuracy_norm"] = mean_known(o.correct_norm for o in outcomes)
    if outcomes[0].correct_flexible is not None:
        metrics["accuracy_flexible"] = mean_known(o.correct_flexible for o in outcomes)
    if yes is not None:
        metrics["f1"] = _f1(outcomes, yes)
    return metrics


def truncated_fraction(outcomes: Sequence[Outcome]) -> float | None:
    """Examples that lost the start of their prompt; None where the evaluator does not say."""
    known = [float(o.truncated) for o in outcomes if o.truncated is not None]
    return mean_known(known) if known else None


def _f1(outcomes: Sequence[Outcome], yes: str) -> float:
    """2 TP / (2 TP + FP + FN), 0 where neither an example nor a prediction is positive."""
    positive = sum((o.gold == yes) + (o.predicted == yes) for o in outcomes)
    hits = sum(o.gold == yes == o.predicted for o in outcomes)
    return 2 * hits / positive if positive else 0.0


def _perplexity(windows: Sequence[Outcome]) -> Metrics:
    """exp of the mean negative log-likelihood of a token, windows having equal lengths; its standard error is that of
    the mean by the delta method."""
    losses = [-window.log_likelihoods[0] for window in windows]
    try:
        perplexity = math.exp(math.fsum(losses) / len(losses))
    except OverflowError as error:
        raise RunError(f"a perplexity must be finite, got a mean loss of {mean_known(losses):.0f}.") from error
    stderr = standard_error(losses)
    return {
        "perplexity": perplexity,
        "perplexity_stderr": None if stderr is None else perplexity * stderr,
        "n_examples": len(losses),
    }


def primary_metric(metrics: Metrics) -> str:
    """The name of the metric that a task is judged by."""
    return "accuracy" if "accuracy" in metrics else "perplexity"


def mean_known(values: Iterable[float | None]) -> float:
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean, from the sample's variance; None for a single value."""
    n, mean = len(values), math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None


def combined(by_task: dict[str, Metrics]) -> Metrics:
    """The metrics of a mixture: tasks count alike, however many examples they have. Those of the only task, if one."""
    if len(by_task) == 1:
        return next(iter(by_task.values()))
    means = ("accuracy", "chance_accuracy", "truncated_fraction")
    stderrs = [metrics["accuracy_stderr"] for metrics in by_task.values()]
    known = [stderr for stderr in stderrs if stderr is not None]
    return {
        **{name: mean_known(metrics[name] for metrics in by_task.values()) for name in means},
        "accuracy_stderr": math.hypot(*known) / len(known) if len(known) == len(stderrs) else None,
        "n_examples": sum(int(metrics["n_examples"] or 0) for metrics in by_task.values()),
    }
