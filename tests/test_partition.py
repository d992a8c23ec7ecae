"""Spans of tokens, proved by properties."""

from hypothesis import given
from hypothesis import strategies as st

from sp_attention.distributed.partition import span_of, spans

RANKS = st.integers(1, 64)


@given(length=st.integers(0, 10_000), ranks=RANKS)
def test_spans_cover_every_token_once_in_order(length: int, ranks: int) -> None:
    assert [token for span in spans(length, ranks) for token in range(span.start, span.stop)] == list(range(length))


@given(length=st.integers(0, 10_000), ranks=RANKS)
def test_span_sizes_differ_by_at_most_one(length: int, ranks: int) -> None:
    sizes = [len(span) for span in spans(length, ranks)]
    assert len(sizes) == ranks
    assert max(sizes) - min(sizes) <= 1


@given(length=st.integers(0, 10_000), ranks=RANKS, data=st.data())
def test_one_span_is_that_of_all_spans(length: int, ranks: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    assert span_of(rank, length, ranks) == spans(length, ranks)[rank]
