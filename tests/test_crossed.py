"""Means over rows and columns that are both drawn: against written-out cases, scipy and statsmodels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.stats.crossed import (
    Block,
    column_variances,
    over_both,
    over_columns,
    rest_variance,
    row_variances,
)

SLEEP = np.subtract(
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4], [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0, 2]
)
"""Student's (1908) extra hours of sleep under two drugs: t = 4.0621 with 9 df."""


def block(values: Any, name: str = "b", pool: str = "t", share: float = 1.0, **changes: Any) -> Block:
    array = np.array(values, float)
    fields = {"group": name, "rows": range(len(array)), "pool": pool, "columns": np.arange(array.shape[1])}
    return Block(array, share=share, **fields | changes)


def random_block(seed: int, rows: int = 4, columns: int = 30, **changes: Any) -> Block:
    rng = np.random.default_rng(seed)
    parts = rng.normal(0, 0.3, (rows, 1)) + rng.normal(0, 0.8, columns) + rng.normal(0, 1, (rows, columns))
    return block(parts, f"b{seed}", **changes)


def test_drawn_columns_alone_are_students_t() -> None:
    found = over_columns([block([SLEEP])])
    assert (found.value, found.df) == (pytest.approx(1.58), 9)
    assert found.value / found.variance**0.5 == pytest.approx(4.0621, abs=1e-4)


def test_the_parts_are_those_of_the_two_way_analysis_of_variance() -> None:
    """Mean squares by statsmodels, each divided by the number of values."""
    import pandas as pd
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    one = random_block(0)
    table = pd.DataFrame([(r, c, v) for (r, c), v in np.ndenumerate(one.values)], columns=["r", "c", "v"])
    squares = anova_lm(ols("v ~ C(r) + C(c)", table).fit())["mean_sq"] / one.values.size
    [(rows, df_rows)], [(columns, df_columns)] = row_variances([one]), column_variances([one])
    assert (rows, columns, rest_variance([one])) == pytest.approx(tuple(squares))
    assert (df_rows, df_columns) == (3, 29)
    assert over_both([one]).variance == pytest.approx(max(rows, columns, rows + columns - squares["Residual"]))


def test_it_is_the_two_way_clustered_variance_of_statsmodels_but_for_small_samples() -> None:
    import statsmodels.api as sm
    from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

    one = random_block(1, rows=60, columns=60)
    rows, columns = np.indices(one.values.shape).reshape(2, -1)
    fit = sm.OLS(one.values.ravel(), np.ones(one.values.size)).fit()
    clustered = float(np.squeeze(cov_cluster_2groups(fit, rows, columns)[0]))
    assert over_both([one]).variance == pytest.approx(clustered, rel=0.03)


def test_columns_that_blocks_share_add_up_and_others_do_not() -> None:
    one = random_block(2)
    both = [block(one.values, name, pool, 0.5) for name, pool in (("x", "t"), ("y", "t"))]
    apart = [block(one.values, name, pool, 0.5) for name, pool in (("x", "t"), ("y", "u"))]
    alone = column_variances([one])[0][0]
    assert sum(v for v, _ in column_variances(both)) == pytest.approx(alone)
    assert sum(v for v, _ in column_variances(apart)) == pytest.approx(alone / 2)


def test_rows_that_blocks_share_add_up_and_others_do_not() -> None:
    one = random_block(3)
    shared = [block(one.values, "g", pool, 0.5) for pool in ("t", "u")]
    apart = [block(one.values, name, name, 0.5) for name in ("t", "u")]
    alone = row_variances([one])[0][0]
    assert row_variances(shared) == [(pytest.approx(alone), 3)]
    assert sum(v for v, _ in row_variances(apart)) == pytest.approx(alone / 2)


def test_columns_are_shared_by_name_not_by_place() -> None:
    one = random_block(4)
    order = np.random.default_rng(0).permutation(30)
    turned = block(one.values[:, order], "y", share=0.5, columns=order)
    assert column_variances([block(one.values, share=0.5), turned])[0][0] == pytest.approx(
        column_variances([one])[0][0]
    )


def test_degrees_of_freedom_are_satterthwaites_and_capped_at_twice_the_rows() -> None:
    rows_alone = block(np.repeat([[0.0], [1.0], [3.0]], 50, axis=1))
    assert over_both([rows_alone]).df == pytest.approx(2)
    columns_alone = block([SLEEP] * 3)
    assert over_both([columns_alone]).df == 4


def test_it_agrees_with_a_bootstrap_over_rows_and_columns() -> None:
    """Ten seeds and 200 examples of three blocks, two of which share examples. The bootstrap takes seeds of each block
    and examples of each pool; it is a little wide, for it counts the rest more than once (Owen 2007)."""
    rng = np.random.default_rng(5)
    liked = rng.normal(0, 0.5, 200)
    blocks = [
        block(liked * (pool == "t") + rng.normal(0, 0.1, (10, 1)) + rng.normal(0, 0.5, (10, 200)), str(i), pool, 1 / 3)
        for i, pool in enumerate("ttu")
    ]
    drawn = np.zeros(4000)
    for pool in "tu":
        examples = rng.multinomial(200, np.full(200, 1 / 200), 4000) / 200
        for one in (b for b in blocks if b.pool == pool):
            seeds = rng.multinomial(10, np.full(10, 1 / 10), 4000) / 10
            drawn += one.share * ((seeds @ one.values) * examples).sum(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    found = over_both(blocks)
    half = stats.t.ppf(0.975, found.df) * found.variance**0.5
    assert 2 * half == pytest.approx(high - low, rel=0.1)
    assert found.value == pytest.approx((low + high) / 2, abs=0.1 * half)
