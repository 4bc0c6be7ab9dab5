from __future__ import annotations

from dataclasses import replace
from math import exp, isclose, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from tune_sparse.data.tasks import TASKS
from tune_sparse.errors import InputError
from tune_sparse.evaluation.metrics import (
    MEAN,
    Metrics,
    combined,
    compute_metrics,
    judged_again,
    mean_known,
    score_name,
    standard_error,
    with_earlier,
)
from tune_sparse.evaluation.outcomes import Outcome

BOOLQ, GSM8K, WIKITEXT = TASKS["boolq"], TASKS["gsm8k"], TASKS["wikitext2"]


def choices(golds: str, predictions: str, norm: str = "") -> list[Outcome]:
    """A digit an example; `norm` says whether the length-normalised choice was right."""
    return [
        Outcome("t", str(i), gold, predicted, gold == predicted, norm[i] == "1" if norm else gold == predicted)
        for i, (gold, predicted) in enumerate(zip(golds, predictions, strict=True))
    ]


def answer(name: str, gold: str, predicted: str | None, *, strict: bool, flexible: bool, cut: bool = False) -> Outcome:
    return Outcome(
        "gsm8k", name, gold, predicted, exact_match_strict=strict, exact_match_flexible=flexible, text="", cut=cut
    )


def windows(*per_token: float) -> list[Outcome]:
    return [Outcome("wikitext2", f"window {i}", log_likelihoods=(value,)) for i, value in enumerate(per_token)]


def test_the_metrics_of_choices_by_hand() -> None:
    found = compute_metrics(TASKS["hellaswag"], choices("0012", "0210", norm="0111"))
    assert found == {
        "primary_metric": "acc_norm",
        "accuracy": 0.75,
        "accuracy_stderr": pytest.approx(sqrt(0.75 * 0.25 / 3)),
        "acc": 0.5,
        "acc_stderr": pytest.approx(sqrt(0.5 * 0.5 / 3)),
        "acc_norm": 0.75,
        "acc_norm_stderr": pytest.approx(sqrt(0.75 * 0.25 / 3)),
        "chance_accuracy": 0.25,
        "n_examples": 4,
        "truncated_fraction": None,
        "cut_fraction": None,
        "majority_fraction": 0.5,
        "most_frequent_fraction": 0.5,
    }


def test_majority_and_most_frequent_look_at_labels_and_predictions_apart() -> None:
    found = compute_metrics(BOOLQ, choices("00011", "11111"))
    assert (found["majority_fraction"], found["most_frequent_fraction"]) == (0.6, 1.0)


def test_the_metrics_of_answers_by_hand() -> None:
    answers = [
        answer("a", "5", "5", strict=True, flexible=True),
        answer("b", "5", None, strict=False, flexible=True),
        answer("c", "7", None, strict=False, flexible=False, cut=True),
    ]
    found = compute_metrics(GSM8K, answers)
    assert (found["primary_metric"], found["accuracy"]) == ("exact_match_strict", pytest.approx(1 / 3))
    assert found["exact_match_strict"] == found["accuracy"]
    assert found["exact_match_flexible"] == pytest.approx(2 / 3)
    assert found["exact_match_flexible_stderr"] == found["exact_match_strict_stderr"] == pytest.approx(1 / 3)
    assert found["majority_fraction"] == found["most_frequent_fraction"] == pytest.approx(2 / 3)
    assert found["cut_fraction"] == pytest.approx(1 / 3)
    assert not {"acc", "acc_norm", "f1"} & found.keys()


def test_no_answer_found_is_a_prediction_like_any_other() -> None:
    answers = [answer(str(i), "5", None, strict=False, flexible=False) for i in range(4)]
    assert compute_metrics(GSM8K, answers)["most_frequent_fraction"] == 1.0


@pytest.mark.parametrize(
    ("golds", "predictions", "f1"),
    [("1100", "1010", 0.5), ("1100", "1100", 1.0), ("11", "00", 0.0), ("00", "00", 0.0), ("110", "111", 0.8)],
)
def test_f1_by_hand(golds: str, predictions: str, f1: float) -> None:
    """2 TP / (2 TP + FP + FN)"""
    assert compute_metrics(BOOLQ, choices(golds, predictions))["f1"] == pytest.approx(f1)


LABELS = st.lists(st.tuples(st.sampled_from("01"), st.sampled_from("01")), min_size=1, max_size=30)


@given(LABELS)
def test_f1_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    golds, predictions = ("".join(column) for column in zip(*pairs, strict=True))
    expected = f1_score(list(golds), list(predictions), pos_label="1", average="binary", zero_division=0.0)
    assert compute_metrics(BOOLQ, choices(golds, predictions))["f1"] == pytest.approx(expected)


def test_the_standard_error_of_f1_is_that_of_a_bootstrap() -> None:
    golds, predictions = "1100" * 50, "1010" * 30 + "1100" * 20
    found = compute_metrics(BOOLQ, choices(golds, predictions))
    pairs, rng = np.array([list(golds), list(predictions)]).T, np.random.default_rng(0)
    drawn = [pairs[rng.integers(0, len(pairs), len(pairs))] == "1" for _ in range(4000)]
    f1 = [2 * both.all(axis=1).sum() / both.sum() for both in drawn]
    assert found["f1_stderr"] == pytest.approx(float(np.std(f1)), rel=0.05)


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_the_standard_error_is_that_of_a_sample_mean(correct: list[bool]) -> None:
    values = torch.tensor(correct, dtype=torch.float64)
    expected = float(values.std() / len(correct) ** 0.5)
    assert standard_error(list(map(float, correct))) == pytest.approx(expected, abs=1e-12)


def test_one_example_has_no_standard_error() -> None:
    assert compute_metrics(BOOLQ, choices("0", "0"))["accuracy_stderr"] is None
    assert compute_metrics(WIKITEXT, windows(-1.0))["perplexity_stderr"] is None


def test_the_truncated_are_counted_where_the_evaluator_says_so() -> None:
    known = [replace(o, truncated=i == 0) for i, o in enumerate(choices("0101", "0000"))]
    assert compute_metrics(BOOLQ, known)["truncated_fraction"] == 0.25
    assert compute_metrics(BOOLQ, choices("01", "01"))["truncated_fraction"] is None


def test_missing_values_are_not_in_a_mean() -> None:
    assert mean_known([1.0, None, 0.0, None]) == 0.5


def test_perplexity_by_hand() -> None:
    """Of two windows whose tokens have one chance in 2 and one in 8, in the geometric mean: 4."""
    found = compute_metrics(WIKITEXT, windows(-log(2), -log(8)))
    assert found == {
        "perplexity": pytest.approx(4.0),
        "perplexity_stderr": pytest.approx(4.0 * log(2)),
        "n_examples": 2,
        "primary_metric": "perplexity",
    }


@given(st.lists(st.floats(-20, 0), min_size=2, max_size=20))
def test_the_error_of_perplexity_is_that_of_its_exponent_to_first_order(values: list[float]) -> None:
    found = compute_metrics(WIKITEXT, windows(*values))
    mean, stderr = -mean_known(values), standard_error(values)
    assert stderr is not None
    assert found["perplexity"] == pytest.approx(exp(mean))
    assert found["perplexity_stderr"] == pytest.approx(exp(mean) * stderr, abs=1e-9)


def test_a_task_is_judged_by_accuracy_or_perplexity() -> None:
    assert score_name(compute_metrics(BOOLQ, choices("01", "01"))) == "accuracy"
    assert score_name(compute_metrics(WIKITEXT, windows(-1.0, -2.0))) == "perplexity"


def hellaswag(*, acc: str, norm: str) -> Metrics:
    return compute_metrics(TASKS["hellaswag"], choices("0000", acc, norm))


def earlier() -> Metrics:
    """Of a run: 1 of 4 by acc and 3 of 4 by acc_norm; before tuning 2 and 0, before the merge 4 and 4."""
    before_tuning, before_merge = hellaswag(acc="0011", norm="0000"), hellaswag(acc="0000", norm="1111")
    return with_earlier(hellaswag(acc="0111", norm="1110"), before_tuning, before_merge)


def test_each_metric_has_what_it_was_earlier_beside_it() -> None:
    found = earlier()
    assert [found[f"acc{suffix}"] for suffix in ("", "_before_tuning", "_before_merge")] == [0.25, 0.5, 1.0]
    assert [found[f"acc_norm{suffix}"] for suffix in ("", "_before_tuning", "_before_merge")] == [0.75, 0.0, 1.0]
    assert [found[f"accuracy{suffix}"] for suffix in ("", "_before_tuning", "_before_merge")] == [0.75, 0.0, 1.0]
    alone = with_earlier(hellaswag(acc="0000", norm="1111"), hellaswag(acc="0000", norm="1111"), None)
    assert alone["acc_before_merge"] is alone["accuracy_before_merge"] is None


def test_a_reader_chooses_another_primary_metric() -> None:
    own = earlier()
    found = judged_again(own, "hellaswag", {"hellaswag": "acc", "gsm8k": "exact_match_flexible"})
    changed = {"primary_metric": "acc", "accuracy": 0.25, "accuracy_stderr": own["acc_stderr"]}
    assert found == own | changed | {"accuracy_before_tuning": 0.5, "accuracy_before_merge": 1.0}
    assert judged_again(own, "hellaswag", {"gsm8k": "exact_match_flexible"}) is own
    assert judged_again(found, "hellaswag", {"hellaswag": "acc_norm"}) == own


def test_a_metric_that_was_not_recorded_cannot_be_chosen() -> None:
    with pytest.raises(InputError, match="must be in the record, got acc of none"):
        judged_again({"accuracy": 0.5}, "hellaswag", {"hellaswag": "acc"})


def test_a_mixture_is_judged_by_the_mean_of_its_tasks_primary_metrics() -> None:
    boolq = compute_metrics(BOOLQ, choices("0011", "0010"))
    mixed = combined({"hellaswag": earlier(), "boolq": with_earlier(boolq, boolq, boolq)})
    assert (mixed["primary_metric"], mixed["accuracy"]) == (MEAN, 0.75)
    assert (mixed["accuracy_before_tuning"], mixed["accuracy_before_merge"]) == (0.375, 0.875)
    found = judged_again(mixed, "hellaswag+boolq", {"hellaswag": "acc"})
    assert (found["primary_metric"], found["accuracy"], found["accuracy_before_tuning"]) == (MEAN, 0.5, 0.625)
    assert found["by_task"]["boolq"] == mixed["by_task"]["boolq"]


def accuracy_metrics(accuracy: float, stderr: float | None, chance: float, n: int, truncated: float = 0.0) -> Metrics:
    return {
        "accuracy": accuracy,
        "accuracy_stderr": stderr,
        "chance_accuracy": chance,
        "n_examples": n,
        "truncated_fraction": truncated,
    }


def test_the_metrics_of_one_task_are_its_own() -> None:
    own = compute_metrics(BOOLQ, choices("01", "00"))
    assert combined({"boolq": own}) == own


def test_tasks_of_a_mixture_count_alike() -> None:
    by_task = {"a": accuracy_metrics(0.2, 0.03, 0.0, 100, 0.5), "b": accuracy_metrics(0.6, 0.04, 0.5, 4)}
    assert combined(by_task) == {
        "truncated_fraction": pytest.approx(0.25),
        "accuracy": pytest.approx(0.4),
        "chance_accuracy": pytest.approx(0.25),
        "accuracy_stderr": pytest.approx(0.05 / 2),
        "n_examples": 104,
        "cut_fraction": None,
        "primary_metric": "mean",
        "by_task": by_task,
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
