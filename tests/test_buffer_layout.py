"""How heads lie in what an all-to-all sends and receives, proved by properties."""

from hypothesis import given
from hypothesis import strategies as st

from sp_attention.distributed.partition import spans
from sp_attention.ulysses.buffer_layout import BufferLayout, buffer_layout
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

KINDS, SIZES, BATCH = ("query", "kv"), (4, 3), 2
# Key/value heads and the query heads that share each; ranks, few and many; tokens.
CASES = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 20), st.integers(0, 60))


def layouts(case: tuple[int, int, int, int]) -> tuple[HeadPlan, list[BufferLayout]]:
    """The plan, and the layout of every rank."""
    kv_heads, group, ranks, length = case
    plan = head_plan(kv_heads * group, kv_heads, ranks)
    return plan, [buffer_layout(plan, KINDS, SIZES, BATCH, length, rank) for rank in range(ranks)]


def sent(layout: BufferLayout, rank: int, ranks: int) -> int:
    """The numbers that a layout sends to a rank; where all have as many of both, they are not listed."""
    return layout.travelling // ranks if layout.by_heads is None else layout.by_heads[rank]


@given(CASES)
def test_ranges_are_the_heads_of_all_ranks_in_order(case: tuple[int, int, int, int]) -> None:
    plan, each = layouts(case)
    # A rank has heads of both, or none.
    expected = [heads for heads in zip(plan.query, plan.kv, strict=True) if heads[0]]
    for layout in each:
        found = [
            tuple(
                range(start := heads.start + (0 if heads.same else i * heads.each), start + heads.each)
                for heads in ranks.heads
            )
            for ranks in layout.ranges
            for i in range(ranks.ranks)
        ]
        assert found == expected
        assert sum(ranks.ranks * ranks.width for ranks in layout.ranges) == layout.all_widths


@given(CASES)
def test_a_rank_sends_what_the_other_one_expects(case: tuple[int, int, int, int]) -> None:
    _, each = layouts(case)
    for sender, layout in enumerate(each):
        assert layout.travelling == sum(sent(layout, receiver, len(each)) for receiver in range(len(each)))
        for receiver, other in enumerate(each):
            if layout.by_heads is not None and other.by_tokens is not None and receiver != sender:
                assert layout.by_heads[receiver] == other.by_tokens[sender] == BATCH * len(layout.mine) * other.width


@given(CASES)
def test_all_tokens_are_sent_or_stay(case: tuple[int, int, int, int]) -> None:
    length = case[3]
    _, each = layouts(case)
    assert [layout.mine for layout in each] == list(spans(length, len(each)))
    for rank, layout in enumerate(each):
        stays = [ranks.width for ranks in layout.ranges if ranks.is_own]
        assert stays in ([], [layout.width])
        if stays:
            assert [*layout.sent] == [token for token in range(length) if token not in layout.mine]
            assert layout.by_heads is not None
            assert layout.by_heads[rank] == 0
        elif layout.width:
            assert layout.sent == range(length)


@given(CASES)
def test_heads_are_shared_where_two_ranks_have_the_same_one(case: tuple[int, int, int, int]) -> None:
    plan, each = layouts(case)
    for layout in each:
        for kind, shares in zip(KINDS, layout.shares, strict=True):
            heads = [head for span in getattr(plan, kind) for head in span]
            assert shares == (len(heads) > len({*heads}))
