"""Masks as runs and as sequences: nothing more and nothing less is seen, and usual masks cost one call."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import masks
from torch import Tensor

from sp_attention import testing
from sp_attention.kernels import varlen
from sp_attention.kernels.intervals import GROWS, JUMPS, SHRINKS, SLIDES, STAYS, Run, contiguous, runs
from sp_attention.kernels.request import Mask
from sp_attention.kernels.varlen import Calls, Pattern, Sequences


def expected_of(mask: Mask) -> Tensor:
    """[B, Sq, Sk] bool."""
    return mask.dense()[:, 0].expand(mask.batch, -1, -1)


def flat(rows: Tensor) -> Tensor:
    """[B, Sq, Sk] → [B * Sq, B * Sk]: no row sees another."""
    return torch.block_diag(*rows.int()).bool()


# The interval of the query `later` places behind the first of a run, whose own is [first, last).
MOVES = {
    STAYS: lambda first, last, later: (first, last),
    SHRINKS: lambda first, last, later: (first + later, last),
    SLIDES: lambda first, last, later: (first + later, last + later),
}


@settings(max_examples=500, deadline=None)
@given(masks())
def test_runs_are_what_queries_see(mask: Mask) -> None:
    found, real = runs(mask)
    widest = mask.key_length if mask.window is None else mask.window if mask.causal else 2 * mask.window - 1
    seen = torch.zeros(mask.batch * mask.query_length, mask.batch * mask.key_length, dtype=torch.bool)
    queries = [query for run in found for query in run.queries]
    assert queries == sorted(set(queries))
    for run in found:
        assert run.queries.start // mask.query_length == (run.queries.stop - 1) // mask.query_length
        assert (len(run.queries) == 1) == (run.kind == JUMPS)
        for later, query in enumerate(run.queries):
            first, last = run.keys.start, run.keys.start + run.first
            if run.kind == GROWS:
                first, last = max(first, last + later - widest), last + later
            elif run.kind != JUMPS:
                first, last = MOVES[run.kind](first, last, later)
            seen[query, real[first:last]] = True
        assert last == run.keys.stop
    assert torch.equal(seen, flat(expected_of(mask)))


@settings(max_examples=200, deadline=None)
@given(masks())
def test_keys_are_contiguous_where_no_padding_lies_between_those_of_a_document(mask: Mask) -> None:
    whole = replace(mask, causal=False, window=None, query_length=mask.key_length, offset=0)
    rows = torch.arange(mask.key_length).expand_as(expected_of(whole)), expected_of(whole)
    seen = [places[row] for places, row in zip(*(each.flatten(0, 1) for each in rows), strict=True)]
    assert contiguous(mask) == all(bool((places.diff() == 1).all()) for places in seen)


def test_functions_and_tensors_leave_no_intervals() -> None:
    mask = Mask(1, 4, 4, torch.device("cpu"))
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for other in (replace(mask, explicit=everything), replace(mask, function=lambda *indices: everything)):
        assert not contiguous(other)
        assert varlen.whole(other) is None
        with pytest.raises(ValueError, match="a mask function or a mask tensor leaves no intervals"):
            runs(other)


def visible(queries: int, keys: int, pattern: Pattern) -> Tensor:
    """[queries, keys] bool: what the queries of one sequence see."""
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = (distance <= 0) | (not pattern.causal)
    if pattern.before is not None:
        seen &= distance >= -pattern.before
    if pattern.after is not None:
        seen &= distance <= pattern.after
    return seen


def seen_by(mask: Mask, calls: Calls) -> Tensor:
    """[B * Sq, B * Sk] bool."""
    queries, keys = mask.batch * mask.query_length, mask.batch * mask.key_length
    result = torch.zeros(queries, keys, dtype=torch.bool)
    for one in calls.sequences:
        query = torch.arange(queries) if one.queries is None else one.queries
        key = torch.arange(keys) if one.keys is None else one.keys
        assert one.query_edges.dtype == one.key_edges.dtype == torch.int32
        cut = [each.split(edges.diff().tolist()) for each, edges in ((query, one.query_edges), (key, one.key_edges))]
        for mine, its in zip(*cut, strict=True):
            assert 0 < len(mine) <= one.longest_query
            assert 0 < len(its) <= one.longest_key
            assert not result[mine].any(), "a query is in one sequence at most"
            result[mine[:, None], its] = visible(len(mine), len(its), one.pattern)
    return result


def written_out(query: Tensor, key: Tensor, value: Tensor, some: Sequences) -> Tensor:
    """A kernel for sequences: each query's output is the sum of itself and the values it sees."""
    sizes = [edges.diff().tolist() for edges in (some.query_edges, some.key_edges, some.key_edges)]
    parts = zip(*(t.split(size) for t, size in zip((query, key, value), sizes, strict=True)), strict=True)
    return torch.cat(
        [
            mine + torch.einsum("qk,khd->qhd", visible(len(mine), len(its), some.pattern).to(v), v)
            for mine, its, v in parts
        ]
    )


@settings(max_examples=500, deadline=None)
@given(masks(), st.none() | st.integers(1, 3), st.none() | st.integers(1, 20))
def test_every_query_sees_what_the_mask_says(mask: Mask, sequences: int | None, tokens: int | None) -> None:
    limits = {"sequences": sequences, "tokens": tokens}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    calls = varlen.calls(mask, **limits)
    expected = expected_of(mask)
    assert torch.equal(seen_by(mask, calls), flat(expected))
    for one in calls.sequences:
        held, length = len(one.query_edges) - 1, max(int(one.query_edges[-1]), int(one.key_edges[-1]))
        assert held <= limits.get("sequences", held)
        assert held == 1 or length <= limits.get("tokens", length)
    query = torch.rand(mask.batch, mask.query_length, 1, 1, dtype=torch.float64)
    key = torch.rand(mask.batch, mask.key_length, 1, 1, dtype=torch.float64)
    out = varlen.attend(calls, query, key, key, written_out)
    sums = torch.einsum("bqk,bkhd->bqhd", expected.double(), key)
    torch.testing.assert_close(out, (query + sums) * expected.any(-1)[..., None, None])
    found = varlen.whole(mask)
    if found is not None:
        pattern, keys = found
        assert torch.equal(visible(mask.query_length, keys, pattern), expected[0, :, :keys])
        assert not expected[:, :, keys:].any()


def usual(**conditions: object) -> Mask:
    return Mask(2, 37, 37, torch.device("cpu"), **conditions)


def test_runs_of_usual_masks() -> None:
    right = testing.FEATURES["right padding"]().mask.padding[:1]
    mask = replace(usual(padding=right), batch=1)
    assert runs(mask)[0] == [Run(GROWS, range(30), range(30), 1), Run(STAYS, range(30, 37), range(30), 30)]
    assert runs(replace(mask, window=7))[0] == [
        Run(GROWS, range(30), range(30), 1),
        Run(SHRINKS, range(30, 36), range(24, 30), 6),
    ]


def test_masks_without_documents_and_padding_are_one_call_as_a_whole() -> None:
    assert varlen.whole(usual()) == (Pattern(True), 37)
    assert varlen.whole(usual(window=7)) == (Pattern(True, 6, 0), 37)
    assert varlen.whole(usual(causal=False)) == (Pattern(), 37)
    assert varlen.whole(usual(causal=False, window=7)) == (Pattern(False, 6, 6), 37)
    assert varlen.whole(Mask(2, 11, 37, torch.device("cpu"), window=7, offset=17)) == (Pattern(True, 6, 0), 28)
    assert varlen.whole(Mask(2, 11, 37, torch.device("cpu"), causal=False, window=7, offset=17)) is None


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_one_call_that_moves_nothing(causal: bool, window: int | None) -> None:
    documents = testing.FEATURES["packed documents"]().mask.documents
    calls = varlen.calls(usual(documents=documents, causal=causal, window=window))
    first = calls.sequences[0]
    if causal or window is None:
        assert len(calls.sequences) == 1
        assert calls.places is first.queries is first.keys is None
        assert first.query_edges.tolist() == first.key_edges.tolist() == [0, 9, 10, 37, 53, 73, 74]
    else:
        # The window has two ends in every document; queries near either end see fewer keys.
        assert {one.pattern for one in calls.sequences} == {Pattern(True, 12, 0), Pattern()}


@pytest.mark.parametrize("window", [None, 7])
def test_left_padding_is_one_call_without_padding(window: int | None) -> None:
    padding = testing.FEATURES["left padding"]().mask.padding
    (call,) = varlen.calls(usual(padding=padding, window=window)).sequences
    assert call.query_edges.tolist() == call.key_edges.tolist() == [0, 28, 65]


def test_right_padding_costs_another_call_for_queries_that_are_padding() -> None:
    causal, full = varlen.calls(usual(padding=testing.FEATURES["right padding"]().mask.padding)).sequences
    assert causal.query_edges.tolist() == causal.key_edges.tolist() == [0, 30, 60]
    assert full.pattern == Pattern()
    assert full.query_edges.tolist() == [0, 7, 11]
    assert full.key_edges.tolist() == [0, 30, 60]
