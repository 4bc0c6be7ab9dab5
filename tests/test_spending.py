from __future__ import annotations

from typing import Any

import pytest

from tune_sparse.config import SweepConfig
from tune_sparse.config.spending import BudgetLimit, FindRule
from tune_sparse.errors import InputError
from tune_sparse.sweep.plan import check_find


def config(**names: Any) -> SweepConfig:
    return SweepConfig.from_names({"models": ["tiny-llama"]} | names)


def test_rules_and_limits_are_read_as_they_are_written() -> None:
    assert FindRule.parse(["within=0.10", "perplexity=1.1"]) == FindRule(0.1, 1.1)
    assert FindRule.parse([]) is None
    assert BudgetLimit.parse("40runs") == BudgetLimit(40, "runs")
    assert str(BudgetLimit.parse("2.5 gpu-hours")) == "2.5 gpu-hours"
    assert config(find="within=0.1", budget="40runs", compare_at="0.5 0.7").compare_at == (0.5, 0.7)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"find": "within=1.5"}, r"within must be in \(0, 1\), got 1.5"),
        ({"find": "within=0"}, r"within must be in \(0, 1\)"),
        ({"find": "perplexity=0.9"}, "ratio to dense, above 1"),
        ({"find": "0.10"}, "find takes within=FRACTION and perplexity=RATIO"),
        ({"find": "within=0.1 within=0.2"}, "find takes within"),
        ({"find": "within=0.1", "sparsities": "0.5 0.7"}, "sparsities must have 0"),
        ({"find": "within=0.1", "sparsities": "0 0.5"}, "at least two sparsities above 0"),
        ({"find": "within=0.1", "budget": "2runs"}, "must buy one bracket, a dense run, a level that passes"),
        ({"find_levels": 3}, "find_levels goes with find"),
        ({"find": "within=0.1", "find_levels": 0}, "find_levels must be at least 1"),
        ({"budget": "2h"}, "a budget is a number above 0 with one of the units runs, cpu-hours, gpu-hours, cs3-hours"),
        ({"budget": "0runs"}, "a budget is a number above 0"),
        ({"compare_at": "0.5"}, "without them every cell is compared"),
        ({"find": "within=0.1", "compare_at": "0.55"}, "takes some of the sparsities above 0, got"),
        ({"find": "within=0.1", "compare_at": "0"}, "takes some of the sparsities above 0, got"),
    ],
)
def test_what_cannot_be_met_is_refused(names: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config(**names)


def test_every_task_needs_a_rule_for_its_metric() -> None:
    check_find(config(find="within=0.1 perplexity=1.1", tasks="boolq wikitext2"))
    with pytest.raises(InputError, match=r"nothing of wikitext2: it is judged by a perplexity. Add perplexity=1.10"):
        check_find(config(find="within=0.1", tasks="boolq wikitext2"))
    with pytest.raises(InputError, match=r"nothing of boolq: it is judged by an accuracy. Add within=0.10"):
        check_find(config(find="perplexity=1.1", tasks="boolq"))
