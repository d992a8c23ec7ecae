"""Head plans, proved by properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sp_attention.ulysses.head_plan import head_plan

RANKS = st.integers(1, 64)
# Key/value heads and the query heads that share each.
HEADS = st.tuples(st.integers(1, 24), st.integers(1, 12))


@given(heads=HEADS, ranks=RANKS)
def test_every_query_head_is_computed_once_and_shares_are_balanced(heads: tuple[int, int], ranks: int) -> None:
    kv_heads, group = heads
    plan = head_plan(kv_heads * group, kv_heads, ranks)
    assert [head for span in plan.query for head in range(span.start, span.stop)] == list(range(kv_heads * group))
    sizes = [len(span) for span in plan.query]
    assert max(sizes) - min(sizes) <= 1


@given(heads=HEADS, ranks=RANKS)
def test_a_rank_holds_exactly_the_kv_heads_of_its_query_heads(heads: tuple[int, int], ranks: int) -> None:
    kv_heads, group = heads
    plan = head_plan(kv_heads * group, kv_heads, ranks)
    for rank, (query, kv) in enumerate(zip(plan.query, plan.kv, strict=True)):
        needed = [head // group for head in range(query.start, query.stop)]
        assert sorted(set(needed)) == list(range(kv.start, kv.stop))
        assert [kv.start + place for place in plan.kv_of_query(rank)] == needed


@given(heads=HEADS, ranks=RANKS)
def test_grouped_means_that_consecutive_query_heads_share_kv_heads_evenly(heads: tuple[int, int], ranks: int) -> None:
    kv_heads, group = heads
    plan = head_plan(kv_heads * group, kv_heads, ranks)
    for rank, (query, kv) in enumerate(zip(plan.query, plan.kv, strict=True)):
        even = [i * len(kv) // len(query) for i in range(len(query))] if len(query) else []
        assert plan.grouped[rank] == (list(plan.kv_of_query(rank)) == even and not len(query) % max(len(kv), 1))


def test_heads_that_do_not_share_evenly_are_an_error() -> None:
    with pytest.raises(ValueError, match="7 query heads cannot share 2 key/value heads evenly"):
        head_plan(7, 2, 2)
