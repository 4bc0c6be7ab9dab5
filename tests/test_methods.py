from __future__ import annotations

import re

import pytest

from tune_sparse.errors import InputError
from tune_sparse.pruning.methods import ALLOCATIONS, METHODS, PATTERNS, SCORES, Method, method_named, nonsense


def test_the_methods_of_the_matrix_have_names_of_their_own() -> None:
    assert METHODS["unstructured"] == Method("magnitude", "uniform", "element-wise")
    assert METHODS["structured"] == Method("magnitude", "uniform", "structured")
    assert METHODS["random"] == Method("random", "uniform", "element-wise")


def test_every_combination_has_one_name_or_a_reason() -> None:
    combinations = [(s, a, p) for s in SCORES for a in ALLOCATIONS for p in PATTERNS]
    refused = [combination for combination in combinations if nonsense(*combination)]
    named = [(m.score, m.allocation, m.pattern) for m in METHODS.values()]
    assert len(combinations) == 96
    assert sorted(named + refused) == sorted(combinations)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("wanda", ("wanda", "uniform", "element-wise")),
        ("wanda-owl", ("wanda", "owl", "element-wise")),
        ("sparsegpt-2:4", ("sparsegpt", "uniform", "2:4")),
        ("magnitude-erk", ("magnitude", "erk", "element-wise")),
        ("taylor-global", ("taylor", "global", "element-wise")),
        ("random-structured", ("random", "uniform", "structured")),
        ("magnitude-4:8", ("magnitude", "uniform", "4:8")),
    ],
)
def test_a_name_says_score_allocation_and_pattern(name: str, parts: tuple[str, str, str]) -> None:
    assert method_named(name) == Method(*parts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wanda-global", "got 'wanda-global': Wanda's scores compare within an output row, not between layers. Choose"),
        ("sparsegpt-global", "SparseGPT's errors compare within one layer"),
        ("sparsegpt-structured", "a removed channel has no row left"),
        ("magnitude-global-structured", "structured pruning takes as much from every block"),
        ("taylor-owl-2:4", "2:4 fixes the sparsity of every row"),
        ("magnitude", "a method has one name, got 'magnitude', which is called 'unstructured'. Write that."),
        ("magnitude-structured", "which is called 'structured'"),
        ("wnda", "unknown method 'wnda'. Did you mean 'wanda'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(name: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        method_named(name)


@pytest.mark.parametrize(("sparsity", "accepted"), [(0.0, True), (0.5, True), (0.4, False), (0.9, False)])
def test_a_pattern_of_groups_has_one_sparsity(sparsity: float, accepted: bool) -> None:
    METHODS["unstructured"].check_sparsity("unstructured", sparsity)
    if accepted:
        METHODS["wanda-2:4"].check_sparsity("wanda-2:4", sparsity)
    else:
        message = f"the sparsity of wanda-2:4 is 0.5, got {sparsity:g}. Give 0.5, or another method."
        with pytest.raises(InputError, match=re.escape(message)):
            METHODS["wanda-2:4"].check_sparsity("wanda-2:4", sparsity)


def test_what_a_method_needs() -> None:
    calibrated = {name for name, method in METHODS.items() if method.is_calibrated}
    assert {name for name in METHODS if re.match("wanda|sparsegpt|taylor|gradient|.*-owl", name)} == calibrated
    assert {name for name, method in METHODS.items() if method.needs.seed} == {n for n in METHODS if "random" in n}
    assert {name for name, method in METHODS.items() if method.updates_weights} == {n for n in METHODS if "gpt" in n}
