"""The lines of a finished search: every difference has its interval, and none reaches beyond its own trainings."""

from __future__ import annotations

from typing import Any

from analysis.report.search_report import on_test, summary_lines
from tune_sparse.search.racing import Correctness, accuracy_difference


def on_test_examples(correct: str, maximal: str) -> dict[str, Any]:
    mine, other = Correctness.from_text(correct), Correctness.from_text(maximal)
    difference, *interval = accuracy_difference(mine, other)
    row = {"accuracy": mine.accuracy, "parameters": 50}
    return row | {"difference_from_maximal": difference, "interval_95": interval}


def found() -> dict[str, Any]:
    """A search whose winner answers as the maximal does, and whose plain LoRA answers three more rightly."""
    maximal = "1100110011"
    scored = {"winner": maximal, "maximal": maximal, "plain": "1111111011"}
    result: dict[str, Any] = {
        "candidates": 3,
        "stopped_early": 1,
        "answered_fraction": 0.5,
        "front": [{}],
        "test": {name: on_test_examples(answers, maximal) for name, answers in scored.items()},
    }
    result["test"]["maximal"] |= {"difference_from_maximal": None, "interval_95": [None, None]}
    config = {"model": "tiny", "task": "boolq", "method": "wanda", "sparsity": 0.7, "mode": "sparse-to-sparse"}
    return {"config": config | {"sampler": "tpe", "maximal_parameters": 100}, "result": result, "trials": []}


def test_the_interval_of_a_winner_that_answers_as_the_maximal_is_not_empty() -> None:
    row = found()["result"]["test"]["winner"]
    assert row["difference_from_maximal"] == 0.0
    low, high = row["interval_95"]
    assert low < -0.1
    assert high > 0.1


def test_a_search_says_no_more_than_its_trainings_show() -> None:
    search = found()
    _, winner, maximal, plain, scope = summary_lines(search, on_test(search))
    assert maximal == "  maximal      50% of the parameters, test accuracy 0.600", "nothing is compared with itself"
    assert "+0.000 against the maximal [-0." in winner
    assert "+0.300 against the maximal [" in plain
    assert "These trainings, of one seed and at one shared learning rate" in scope
    assert not any(word in line for line in (winner, maximal, plain) for word in ("better", "beats", "significant"))
