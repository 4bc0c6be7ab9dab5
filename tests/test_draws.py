from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tune_sparse.data.draws import drawn, shared_out

KINDS = st.lists(st.sampled_from("abcd"), max_size=60)


@given(KINDS, st.integers(0, 70))
def test_a_draw_is_of_each_kind_in_proportion_and_in_order(kinds: list[str], count: int) -> None:
    found = drawn(kinds, count, "seed")
    assert found == sorted(set(found))
    assert len(found) == min(count, len(kinds))
    for kind in set(kinds):
        share = len(found) * kinds.count(kind) / len(kinds)
        assert abs(sum(kinds[i] == kind for i in found) - share) < 1


@given(KINDS, st.integers(0, 60), st.integers(0, 60))
def test_a_larger_draw_holds_every_smaller_one(kinds: list[str], few: int, more: int) -> None:
    assert set(drawn(kinds, min(few, more), "seed")) <= set(drawn(kinds, max(few, more), "seed"))


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(1, 2000), min_size=1), st.integers(0, 300))
def test_shares_are_within_one_of_proportional(sizes: dict[str, int], count: int) -> None:
    count = min(count, sum(sizes.values()))
    shares = shared_out(sizes, count)
    assert sum(shares.values()) == count
    assert all(abs(shares[kind] - count * size / sum(sizes.values())) < 1 for kind, size in sizes.items())


def test_all_are_drawn_where_no_number_is_given() -> None:
    assert drawn(["a", "b", "a"], None, "seed") == [0, 1, 2]


def test_a_draw_is_named_by_its_seed_alone() -> None:
    kinds = ["a"] * 1000
    assert drawn(kinds, 5, "boolq/test") == drawn(kinds, 5, "boolq/test") == [22, 33, 154, 321, 903]
    assert drawn(kinds, 5, "boolq/selection") != drawn(kinds, 5, "boolq/test")
