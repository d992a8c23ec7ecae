"""Masks and the sequences they are cut into: nothing more and nothing less is seen, and usual masks cost one call."""

import pytest
import torch
from flash_attn_2_cuda import pieces, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from sp_attention_flash.sequences import Cut, Pattern, cut, uncut
from torch import Tensor

from sp_attention import Mask, testing


def seen_by(mask: Mask, sequences: Cut) -> Tensor:
    """[B, Sq, Sk] bool: what a kernel that aligns the last query with the last key lets the queries see."""
    batch, queries, keys = mask.batch, mask.query_length, mask.key_length
    result = torch.zeros(batch * queries, batch * keys, dtype=torch.bool)
    for one in sequences.calls:
        query = torch.arange(batch * queries) if one.queries is None else one.queries
        key = torch.arange(batch * keys) if one.keys is None else one.keys
        assert one.query_edges.dtype == one.key_edges.dtype == torch.int32
        for at_query, at_key in zip(pieces(one.query_edges), pieces(one.key_edges), strict=True):
            ends = (-1 if end is None else end for end in (one.pattern.before, one.pattern.after))
            mine, its = query[at_query], key[at_key]
            assert 0 < len(mine) <= one.longest_query
            assert 0 < len(its) <= one.longest_key
            assert not result[mine].any(), "a query is in one sequence at most"
            result[mine[:, None], its] = visible(len(mine), len(its), one.pattern.causal, *ends)
    rows = result.reshape(batch, queries, batch, keys)
    for row in range(batch):
        assert not rows[row, :, [other for other in range(batch) if other != row]].any(), "rows are apart"
    return torch.stack([rows[row, :, row] for row in range(batch)])


def outputs_are_put_back(mask: Mask, sequences: Cut) -> bool:
    total = mask.batch * mask.query_length
    order = [torch.arange(total) if one.queries is None else one.queries for one in sequences.calls]
    found = torch.cat([*order, torch.tensor([-1])])
    places = torch.arange(total) if sequences.places is None else sequences.places
    blind = ~mask.dense().any(-1).expand(mask.batch, 1, -1).flatten()
    return torch.equal(found[places], torch.where(blind, -1, torch.arange(total)))


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    padding = documents = None
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    if draw(st.booleans()):
        padding = torch.tensor([draw(bits) for _ in range(batch)])
    if draw(st.booleans()):
        documents = torch.tensor([draw(bits) for _ in range(batch)]).int().cumsum(1)
    causal, window = draw(st.booleans()), draw(st.none() | st.integers(1, 14))
    offset, queries = 0, length
    if draw(st.booleans()):
        offset = draw(st.integers(0, length - 1))
        queries = draw(st.integers(1, length - offset))
    return Mask(
        batch, queries, length, torch.device("cpu"), causal=causal, window=window, padding=padding,
        documents=documents, offset=offset,
    )  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(masks())
def test_every_query_sees_what_the_mask_says(mask: Mask) -> None:
    expected = mask.dense()[:, 0].expand(mask.batch, -1, -1)
    sequences = cut(mask)
    assert torch.equal(seen_by(mask, sequences), expected)
    assert outputs_are_put_back(mask, sequences)
    whole = uncut(mask)
    if whole is not None:
        pattern, keys = whole
        ends = (-1 if end is None else end for end in (pattern.before, pattern.after))
        assert torch.equal(visible(mask.query_length, keys, pattern.causal, *ends), expected[0, :, :keys])
        assert not expected[:, :, keys:].any()


def usual(**conditions: object) -> Mask:
    return Mask(2, 37, 37, torch.device("cpu"), **conditions)


def test_masks_without_documents_and_padding_are_not_cut() -> None:
    assert uncut(usual()) == (Pattern(True), 37)
    assert uncut(usual(window=7)) == (Pattern(True, 6, 0), 37)
    assert uncut(usual(causal=False)) == (Pattern(), 37)
    assert uncut(usual(causal=False, window=7)) == (Pattern(False, 6, 6), 37)
    assert uncut(Mask(2, 11, 37, torch.device("cpu"), window=7, offset=17)) == (Pattern(True, 6, 0), 28)
    assert uncut(Mask(2, 11, 37, torch.device("cpu"), causal=False, window=7, offset=17)) is None


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_one_call_that_moves_nothing(causal: bool, window: int | None) -> None:
    documents = testing.FEATURES["packed documents"]().mask.documents
    sequences = cut(usual(documents=documents, causal=causal, window=window))
    first = sequences.calls[0]
    if causal or window is None:
        assert len(sequences.calls) == 1
        assert sequences.places is first.queries is first.keys is None
        assert first.query_edges.tolist() == first.key_edges.tolist() == [0, 9, 10, 37, 53, 73, 74]
    else:
        # The window has two ends in every document; queries near either end see fewer keys.
        assert {one.pattern for one in sequences.calls} == {Pattern(True, 12, 0), Pattern()}


@pytest.mark.parametrize("window", [None, 7])
def test_left_padding_is_one_call_without_padding(window: int | None) -> None:
    (call,) = cut(usual(padding=testing.FEATURES["left padding"]().mask.padding, window=window)).calls
    assert call.query_edges.tolist() == call.key_edges.tolist() == [0, 28, 65]


def test_right_padding_costs_another_call_for_queries_that_are_padding() -> None:
    causal, full = cut(usual(padding=testing.FEATURES["right padding"]().mask.padding)).calls
    assert causal.query_edges.tolist() == causal.key_edges.tolist() == [0, 30, 60]
    assert full.pattern == Pattern()
    assert full.query_edges.tolist() == [0, 7, 11]
    assert full.key_edges.tolist() == [0, 30, 60]
