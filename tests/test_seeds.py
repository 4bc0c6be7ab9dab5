"""Cells over their seeds: means, and which spread stands beside them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from analysis.read.seeds import calibration_words, over_seeds, repeated_settings, shown_metrics, spread, spread_words

ROW = {
    "backend": "torch",
    "model": "tiny",
    "task": "boolq",
    "method": "random",
    "mode": "dense",
    "sparsity": 0.5,
    "schedule": "one-shot",
}
ROW |= {"status": "done", "accuracy_stderr": 0.03, "accuracy_low": 0.4, "primary_metric": "acc", "warnings": ""}


def cells(accuracies: list[float | None], **changes: Any) -> pd.DataFrame:
    """A seed each accuracy; None where the run is missing."""
    rows = [
        ROW | {"seed": seed, "accuracy": value} | (changes if value is not None else {"status": "missing"})
        for seed, value in enumerate(accuracies)
    ]
    table = pd.DataFrame(rows).astype({"accuracy": float})
    table.loc[table["accuracy"].isna(), ["accuracy_stderr", "accuracy_low"]] = math.nan
    return table


def test_several_seeds_have_their_deviation_and_nothing_of_a_single_run() -> None:
    """Dense .80, seeds .79 .55 .55: the first alone would be within 2%."""
    [row] = over_seeds(cells([0.79, 0.55, 0.55])).to_dict("records")
    assert (row["seeds"], row["seeds_done"], row["accuracy"]) == (3, 3, pytest.approx(0.63))
    assert row["accuracy_sd"] == pytest.approx(math.sqrt((0.16**2 + 2 * 0.08**2) / 2))
    assert math.isnan(row["accuracy_stderr"])
    assert math.isnan(row["accuracy_low"])


def test_one_seed_has_the_standard_error_over_its_examples() -> None:
    [row] = over_seeds(cells([0.6])).to_dict("records")
    assert (row["accuracy_stderr"], row["accuracy_low"]) == (0.03, 0.4)
    assert math.isnan(row["accuracy_sd"])


def test_of_requested_seeds_those_that_are_done_count() -> None:
    table = over_seeds(cells([0.6, None, None]))
    [row] = table.to_dict("records")
    assert (row["seeds"], row["seeds_done"], row["accuracy"]) == (3, 1, 0.6)
    assert spread(table, "accuracy").tolist() == [0.03]
    [nothing] = over_seeds(cells([None])).to_dict("records")
    assert nothing["seeds_done"] == 0
    assert math.isnan(nothing["accuracy"])


def test_each_setting_has_its_row_and_its_own_kind_of_spread() -> None:
    table = over_seeds(pd.concat([cells([0.5, 0.7]), cells([0.9]).assign(sparsity=0.0)]))
    assert table["sparsity"].tolist() == [0.0, 0.5]
    assert spread(table, "accuracy").tolist() == [0.03, pytest.approx(math.sqrt(0.02))]


def test_columns_that_a_table_lacks_are_left_out() -> None:
    """As of an earlier format, without the other metrics and what was calibrated on."""
    table = over_seeds(cells([0.5]).drop(columns=["primary_metric", "warnings", "accuracy_stderr", "accuracy_low"]))
    assert spread(table, "accuracy").isna().all()
    assert shown_metrics(table) == {"accuracy": "accuracy"}
    assert calibration_words(table) == ""


def test_warnings_of_all_seeds_are_listed_once() -> None:
    table = cells([0.5, 0.7])
    table["warnings"] = ["at-chance", "OVERLAP at-chance"]
    assert over_seeds(table)["warnings"].tolist() == ["at-chance OVERLAP"]


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ([1, 1], "standard error over examples (one seed)"),
        ([3, 3, 0], "standard deviation between 3 seeds"),
        ([1, 2], "standard deviation between 2 seeds, or where there is one seed the standard error over examples"),
        ([2, 3], "standard deviation between 2 or 3 seeds"),
        ([], "standard error over examples (one seed)"),
    ],
)
def test_a_caption_says_which_spread_it_is(seeds: list[int], words: str) -> None:
    assert spread_words(seeds) == words


def test_the_primary_metric_is_first_and_the_other_one_beside_it() -> None:
    found = {"acc_norm": 0.6, "acc_norm_stderr": 0.02, "acc": 0.5, "acc_stderr": 0.03, "f1": math.nan}
    assert shown_metrics(over_seeds(cells([0.5], **found))) == {"acc": "accuracy", "acc_norm": "acc_norm"}


def test_the_other_metric_has_a_spread_of_its_own() -> None:
    table = cells([0.5, 0.5]).assign(acc_norm=[0.4, 0.6], acc_norm_stderr=0.02)
    assert spread(over_seeds(table), "acc_norm").tolist() == [pytest.approx(math.sqrt(0.02))]


def test_a_text_has_a_perplexity_alone() -> None:
    table = over_seeds(cells([0.5], perplexity=30.0, primary_metric="perplexity").assign(accuracy=math.nan))
    assert shown_metrics(table) == {"perplexity": "perplexity"}


def test_calibration_is_told_by_method() -> None:
    told = {"calibration": "task", "calibration_order": "dense"}
    few = cells([0.5], **told, calibration_tokens_seen=4096.0, method="wanda")
    many = few.assign(calibration_tokens_seen=8192.0, sparsity=0.7)
    none = cells([0.5], calibration=None, calibration_order=None, calibration_tokens_seen=math.nan)
    words = calibration_words(over_seeds(pd.concat([few, many, none])))
    assert words == "wanda: task, dense, 4,096 to 8,192 tokens"


def test_one_setting_twice_is_two_studies() -> None:
    once = cells([0.5, 0.7])
    assert repeated_settings(once).empty
    assert len(repeated_settings(pd.concat([once, once.head(1)]))) == 2
