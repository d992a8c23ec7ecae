"""Grids of head groups × query blocks: which there are, that they cover all work once, and how even they are."""

from hypothesis import given
from hypothesis import strategies as st

from sp_attention.ulysses.grid import Grid, grid_of

HEADS = st.tuples(st.integers(1, 8), st.integers(1, 4)).map(lambda pair: (pair[0] * pair[1], pair[1]))


def test_grids_of_some_sizes() -> None:
    def shape(heads: int, ranks: int) -> tuple[int, int] | None:
        grid = grid_of(heads, 1, ranks)
        return None if grid is None else (grid.groups, grid.blocks)

    assert shape(4, 4) is None
    assert shape(1, 4) == (1, 4)
    assert shape(2, 4) == (2, 2)
    assert shape(3, 6) == (3, 2)
    # Two groups would have two heads and one.
    assert shape(3, 4) == (1, 4)
    assert shape(2, 3) == (1, 3)
    assert shape(128, 1024) == (128, 8)


@given(heads=HEADS, ranks=st.integers(1, 64), length=st.integers(0, 500))
def test_every_query_of_every_head_is_computed_once(heads: tuple[int, int], ranks: int, length: int) -> None:
    grid = grid_of(*heads, ranks)
    if grid is None:
        assert ranks <= heads[0]
        return
    work = sorted(
        (head, query)
        for rank in range(ranks)
        for head in grid.heads.query[grid.group_of(rank)]
        for chunk in grid.chunks(length, rank)
        for query in chunk
    )
    assert work == [(head, query) for head in range(heads[0]) for query in range(length)]


@given(heads=HEADS, ranks=st.integers(1, 64))
def test_no_rank_has_much_more_causal_work_than_another_of_as_many_heads(heads: tuple[int, int], ranks: int) -> None:
    grid = grid_of(*heads, ranks)
    if grid is not None:
        length = 100 * 2 * grid.blocks
        work = {rank: sum(query + 1 for chunk in grid.chunks(length, rank) for query in chunk) for rank in range(ranks)}
        assert max(work.values()) == min(work.values())
        assert kinds_cover_chunks(grid, length)


def kinds_cover_chunks(grid: Grid, length: int) -> bool:
    """Whether kernels are asked about chunks of every length, at the beginning of the sequence and later."""
    asked = {(len(chunk), chunk.start > 0) for chunk in grid.kinds_of_chunks(length)}
    chunks = (chunk for rank in range(grid.ranks) for chunk in grid.chunks(length, rank))
    return asked == {(len(chunk), chunk.start > 0) for chunk in chunks if chunk}
