"""Head plans and buffer layouts against what they say, counted head by head."""

from itertools import product

import pytest

from sp_attention.distributed.partition import spans
from sp_attention.ulysses.buffer_layout import BufferLayout, HeadSlice, RankRange, buffer_layout
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

HEADS = [(4, 4), (6, 3), (7, 7), (5, 1), (8, 2), (2, 1), (12, 6), (6, 2), (9, 9), (18, 3), (10, 10)]
KINDS = [("query", "kv", "kv"), ("query",), ("kv", "stored"), ("query", "stored")]


@pytest.mark.parametrize(
    ("heads", "ranks", "query", "kv", "stored", "kinds"),
    [
        ((4, 2), 1, [(0, 4)], [(0, 2)], [(0, 2)], [(4, 2, 0)]),
        ((6, 3), 2, [(0, 3), (3, 6)], [(0, 2), (1, 3)], [(0, 2), (1, 3)], [(3, 3, 0)]),
        (
            (6, 2),
            4,
            [(0, 2), (2, 4), (4, 5), (5, 6)],
            [(0, 1), (0, 2), (1, 2), (1, 2)],
            [(0, 1), (0, 2), (1, 2), (1, 2)],
            [(2, 1, 0), (2, 2, 1), (1, 1, 2)],
        ),
        (
            (3, 3),
            5,
            [(0, 1), (1, 2), (2, 3), (3, 3), (3, 3)],
            [(0, 1), (1, 2), (2, 3), (3, 3), (3, 3)],
            [(0, 1), (1, 2), (2, 3), (2, 3), (2, 3)],
            [(1, 1, 0)],
        ),
    ],
)
def test_heads_are_shared_out(
    heads: tuple[int, int],
    ranks: int,
    query: list[tuple[int, int]],
    kv: list[tuple[int, int]],
    stored: list[tuple[int, int]],
    kinds: list[tuple[int, int, int]],
) -> None:
    plan = head_plan(*heads, ranks)
    for given, expected in ((plan.query, query), (plan.kv, kv), (plan.stored, stored)):
        assert [(one.start, one.stop) for one in given] == expected
    assert plan.kinds == tuple(kinds)


@pytest.mark.parametrize(("query", "kv"), [(7, 2), (4, 0), (1, 2)])
def test_heads_that_cannot_be_shared_out_are_an_error(query: int, kv: int) -> None:
    with pytest.raises(ValueError, match=f"^{query} query heads cannot share {kv} key/value heads evenly$"):
        head_plan(query, kv, 2)


def heads_of(plan: HeadPlan, kinds: tuple[str, ...], rank: int) -> list[list[int]]:
    return [list(getattr(plan, kind)[rank]) for kind in kinds]


def heads_in(layout: BufferLayout) -> list[tuple[list[list[int]], int, bool]]:
    """The heads of each rank that has any, as the ranges tell them, with its width and whether it is me."""
    return [
        (
            [
                list(range(start, start + heads.each))
                for heads in ranks.heads
                for start in [heads.start + (0 if heads.same else one * heads.each)]
            ],
            ranks.width,
            ranks.is_own,
        )
        for ranks in layout.ranges
        for one in range(ranks.ranks)
    ]


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS, ids="H{}".format)
def test_layouts_hold_what_each_rank_has(query_heads: int, kv_heads: int, kinds: tuple[str, ...]) -> None:
    sizes, batch = (4, 3, 5)[: len(kinds)], 2
    for ranks, length in product((2, 3, 4, 8, 9), (7, 16, 18)):
        plan, cut = head_plan(query_heads, kv_heads, ranks), spans(length, ranks)
        widths = [
            sum(len(heads) * size for heads, size in zip(heads_of(plan, kinds, rank), sizes, strict=True))
            for rank in range(ranks)
        ]
        for me in range(ranks):
            layout = buffer_layout(plan, kinds, sizes, batch, length, me)
            keeps = ranks <= 8 and me in (0, ranks - 1)
            by_heads = [0 if keeps and rank == me else len(cut[me]) * batch * widths[rank] for rank in range(ranks)]
            by_tokens = [0 if keeps and rank == me else len(cut[rank]) * batch * widths[me] for rank in range(ranks)]
            if ranks > 8 and len({len(span) for span in cut}) == 1 and len(set(widths)) == 1:
                assert (layout.by_heads, layout.by_tokens) == (None, None)
            else:
                assert (layout.by_heads, layout.by_tokens) == (by_heads, by_tokens)
            assert layout.heads == tuple(len(heads) for heads in heads_of(plan, kinds, me))
            assert (layout.width, layout.all_widths) == (widths[me], sum(widths))
            assert (layout.mine, layout.travelling) == (cut[me], sum(by_heads))
            mine, travelling = set(cut[me]), set(range(length))
            assert set(layout.sent) == (travelling - mine if keeps else travelling)
            assert layout.sent.start <= layout.sent.stop
            assert heads_in(layout) == [
                (heads_of(plan, kinds, rank), widths[rank], keeps and rank == me)
                for rank in range(ranks)
                if widths[rank]
            ]
            everyone = [heads_of(plan, kinds, rank) for rank in range(ranks)]
            assert layout.shares == tuple(
                len({head for one in everyone for head in one[number]}) < sum(len(one[number]) for one in everyone)
                for number in range(len(kinds))
            )
            for one in layout.ranges:
                assert one.ranks > 1 or not any(heads.same for heads in one.heads)
                assert one.each == tuple(heads.each for heads in one.heads)


def ranges(query_heads: int, kv_heads: int, ranks: int, me: int) -> list[tuple[int, list[tuple[int, int, bool]]]]:
    layout = buffer_layout(head_plan(query_heads, kv_heads, ranks), ("query", "kv"), (1, 1), 1, ranks, me)
    return [(one.ranks, [(heads.start, heads.each, heads.same) for heads in one.heads]) for one in layout.ranges]


def test_neighbours_alike_are_one_range() -> None:
    # The first keeps its own tokens, between two others one sends them too.
    assert ranges(8, 8, 4, 0) == [(1, [(0, 2, False), (0, 2, False)]), (3, [(2, 2, False), (2, 2, False)])]
    assert ranges(8, 8, 4, 3) == [(3, [(0, 2, False), (0, 2, False)]), (1, [(6, 2, False), (6, 2, False)])]
    assert ranges(8, 8, 4, 1) == [(4, [(0, 2, False), (0, 2, False)])]
    # All have the same KV head; two and two have the same one.
    assert ranges(4, 1, 4, 1) == [(4, [(0, 1, False), (0, 1, True)])]
    assert ranges(4, 2, 4, 1) == [(2, [(0, 1, False), (0, 1, True)]), (2, [(2, 1, False), (1, 1, True)])]
    # More heads for some, whose heads go on where those of the others stop.
    assert ranges(7, 7, 4, 1) == [(3, [(0, 2, False), (0, 2, False)]), (1, [(6, 1, False), (6, 1, False)])]
    # Ranks without heads are in none.
    assert ranges(2, 2, 4, 1) == [(2, [(0, 1, False), (0, 1, False)])]
    # KV heads of neighbours that overlap are neither the same nor side by side.
    assert ranges(6, 4 // 2, 4, 1) == [
        (1, [(0, 2, False), (0, 1, False)]),
        (1, [(2, 2, False), (0, 2, False)]),
        (2, [(4, 1, False), (1, 1, True)]),
    ]
    assert ranges(9, 3, 6, 2)[:3] == [
        (1, [(0, 2, False), (0, 1, False)]),
        (1, [(2, 2, False), (0, 2, False)]),
        (1, [(4, 2, False), (1, 1, False)]),
    ]


def test_a_layout_is_made_of_plain_data() -> None:
    plan = head_plan(4, 2, 2)
    assert buffer_layout(plan, ("query", "kv"), (4, 2), 3, 5, 1) == BufferLayout(
        heads=(2, 1),
        width=10,
        all_widths=20,
        mine=range(3, 5),
        sent=range(0, 3),
        travelling=60,
        by_heads=[60, 0],
        by_tokens=[90, 0],
        ranges=(
            RankRange(1, (HeadSlice(0, 2, False), HeadSlice(0, 1, False)), 10, False),
            RankRange(1, (HeadSlice(2, 2, False), HeadSlice(1, 1, False)), 10, True),
        ),
        shares=(False, False),
    )
