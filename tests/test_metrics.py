from __future__ import annotations

from dataclasses import replace
from math import exp, isclose, log, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from tune_sparse.evaluation.metrics import (
    Metrics,
    combined,
    compute_metrics,
    mean_known,
    primary_metric,
    standard_error,
    truncated_fraction,
)
from tune_sparse.evaluation.outcomes import Outcome


def choices(golds: str, predictions: str, norm: str = "") -> list[Outcome]:
    """A digit an example; `norm` says whether the length-normalised choice was right."""
    return [
        Outcome("t", str(i), gold, predicted, gold == predicted, norm[i] == "1" if norm else None)
        for i, (gold, predicted) in enumerate(zip(golds, predictions, strict=True))
    ]


def windows(*per_token: float) -> list[Outcome]:
    return [Outcome("wikitext2", f"window {i}", log_likelihoods=(value,)) for i, value in enumerate(per_token)]


def test_the_metrics_of_choices_by_hand() -> None:
    found = compute_metrics(choices("0012", "0210", norm="0110"), chance=0.25, yes=None)
    assert found == {
        "accuracy": 0.5,
        "accuracy_stderr": pytest.approx(sqrt(0.5 * 0.5 / 3)),
        "chance_accuracy": 0.25,
        "n_examples": 4,
        "truncated_fraction": None,
        "majority_fraction": 0.5,
        "most_frequent_fraction": 0.5,
        "accuracy_norm": 0.5,
    }


def test_majority_and_most_frequent_look_at_labels_and_predictions_apart() -> None:
    found = compute_metrics(choices("00011", "11111"), chance=0.5, yes=None)
    assert (found["majority_fraction"], found["most_frequent_fraction"]) == (0.6, 1.0)


def test_the_metrics_of_answers_by_hand() -> None:
    answers = [
        Outcome("gsm8k", "a", "5", "5", True, correct_flexible=True, text="#### 5"),
        Outcome("gsm8k", "b", "5", None, False, correct_flexible=True, text="5"),
        Outcome("gsm8k", "c", "7", None, False, correct_flexible=False, text=""),
    ]
    found = compute_metrics(answers, chance=0.0, yes=None)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_flexible"] == pytest.approx(2 / 3)
    assert found["majority_fraction"] == found["most_frequent_fraction"] == pytest.approx(2 / 3)
    assert "accuracy_norm" not in found
    assert "f1" not in found


def test_no_answer_found_is_a_prediction_like_any_other() -> None:
    answers = [Outcome("gsm8k", str(i), "5", None, False) for i in range(4)]
    assert compute_metrics(answers, 0.0, None)["most_frequent_fraction"] == 1.0


@pytest.mark.parametrize(
    ("golds", "predictions", "f1"),
    [("1100", "1010", 0.5), ("1100", "1100", 1.0), ("11", "00", 0.0), ("00", "00", 0.0), ("110", "111", 0.8)],
)
def test_f1_by_hand(golds: str, predictions: str, f1: float) -> None:
    """2 TP / (2 TP + FP + FN)"""
    assert compute_metrics(choices(golds, predictions), 0.5, yes="1")["f1"] == pytest.approx(f1)


LABELS = st.lists(st.tuples(st.sampled_from("01"), st.sampled_from("01")), min_size=1, max_size=30)


@given(LABELS)
def test_f1_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    golds, predictions = ("".join(column) for column in zip(*pairs, strict=True))
    expected = f1_score(list(golds), list(predictions), pos_label="1", average="binary", zero_division=0.0)
    assert compute_metrics(choices(golds, predictions), 0.5, yes="1")["f1"] == pytest.approx(expected)


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_the_standard_error_is_that_of_a_sample_mean(correct: list[bool]) -> None:
    values = torch.tensor(correct, dtype=torch.float64)
    expected = float(values.std() / len(correct) ** 0.5)
    assert standard_error(list(map(float, correct))) == pytest.approx(expected, abs=1e-12)


def test_one_example_has_no_standard_error() -> None:
    assert compute_metrics(choices("0", "0"), 0.5, None)["accuracy_stderr"] is None
    assert compute_metrics(windows(-1.0), None, None)["perplexity_stderr"] is None


def test_the_truncated_are_counted_where_the_evaluator_says_so() -> None:
    known = [replace(o, truncated=i == 0) for i, o in enumerate(choices("0101", "0000"))]
    assert truncated_fraction(known) == compute_metrics(known, 0.5, None)["truncated_fraction"] == 0.25
    assert truncated_fraction(choices("01", "01")) is None


def test_missing_values_are_not_in_a_mean() -> None:
    assert mean_known([1.0, None, 0.0, None]) == 0.5


def test_perplexity_by_hand() -> None:
    """Of two windows whose tokens have one chance in 2 and one in 8, in the geometric mean: 4."""
    found = compute_metrics(windows(-log(2), -log(8)), None, None)
    assert found == {
        "perplexity": pytest.approx(4.0),
        "perplexity_stderr": pytest.approx(4.0 * log(2)),
        "n_examples": 2,
    }


@given(st.lists(st.floats(-20, 0), min_size=2, max_size=20))
def test_the_error_of_perplexity_is_that_of_its_exponent_to_first_order(values: list[float]) -> None:
    found = compute_metrics(windows(*values), None, None)
    mean, stderr = -mean_known(values), standard_error(values)
    assert stderr is not None
    assert found["perplexity"] == pytest.approx(exp(mean))
    assert found["perplexity_stderr"] == pytest.approx(exp(mean) * stderr, abs=1e-9)


def test_a_task_is_judged_by_accuracy_or_perplexity() -> None:
    assert primary_metric(compute_metrics(choices("01", "01"), 0.5, None)) == "accuracy"
    assert primary_metric(compute_metrics(windows(-1.0, -2.0), None, None)) == "perplexity"


def accuracy_metrics(accuracy: float, stderr: float | None, chance: float, n: int, truncated: float = 0.0) -> Metrics:
    return {
        "accuracy": accuracy,
        "accuracy_stderr": stderr,
        "chance_accuracy": chance,
        "n_examples": n,
        "truncated_fraction": truncated,
    }


def test_the_metrics_of_one_task_are_its_own() -> None:
    own = compute_metrics(choices("01", "00"), 0.5, "1")
    assert combined({"boolq": own}) == own


def test_tasks_of_a_mixture_count_alike() -> None:
    by_task = {"a": accuracy_metrics(0.2, 0.03, 0.0, 100, 0.5), "b": accuracy_metrics(0.6, 0.04, 0.5, 4)}
    assert combined(by_task) == {
        "truncated_fraction": pytest.approx(0.25),
        "accuracy": pytest.approx(0.4),
        "chance_accuracy": pytest.approx(0.25),
        "accuracy_stderr": pytest.approx(0.05 / 2),
        "n_examples": 104,
    }


def test_a_mixture_with_a_task_of_one_example_has_no_standard_error() -> None:
    by_task = {"a": accuracy_metrics(0.2, 0.03, 0.0, 100), "b": accuracy_metrics(1.0, None, 0.5, 1)}
    assert combined(by_task)["accuracy_stderr"] is None


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(2, 50)), min_size=2, max_size=4))
def test_the_error_of_a_mean_of_tasks_is_that_of_independent_means(tasks: list[tuple[float, int]]) -> None:
    by_task = {str(i): accuracy_metrics(0.5, stderr, 0.0, n) for i, (stderr, n) in enumerate(tasks)}
    found = combined(by_task)["accuracy_stderr"]
    assert found is not None
    assert isclose(found, sqrt(sum(stderr**2 for stderr, _ in tasks)) / len(tasks), abs_tol=1e-12)
