"""Attention a group of heads at a time, on threads, against one process that writes it out, with every gradient."""

from dataclasses import replace

import pytest
from test_attention_of_spans import (
    FEATURES,
    HEADS,
    LENGTH,
    PLAIN,
    asking,
    assert_same,
    gradients,
    request_of,
    summed,
)
from thread_ranks import OnADevice, ThreadPeers, random, run

from sp_attention import testing
from sp_attention.kernels.request import Request
from sp_attention.ulysses import head_groups
from sp_attention.ulysses.attention import Kernel, plan_of
from sp_attention.ulysses.head_groups import attend_in_groups, in_groups


def step(peers: ThreadPeers, request: Request, count: int) -> None:
    expected = asking(request)
    expected_out = testing.attend(expected)
    down = random(*expected_out.shape, seed=8)
    expected_grads = gradients(expected_out, down, expected)

    span, kernel = peers.span(LENGTH), Kernel(PLAIN)
    spans = {name: getattr(request, name)[:, span.start : span.stop] for name in ("query", "key", "value")}
    ours = asking(replace(request, **spans))
    plans = [plan_of(one, peers.size, kernel) for one in in_groups(ours, count)]
    with OnADevice():
        out = attend_in_groups(ours, LENGTH, plans, peers, kernel)
    assert_same(out, expected_out[:, span.start : span.stop])
    before = len(peers.met)
    found = gradients(out, down[:, span.start : span.stop], ours)
    assert peers.size == 1 or len(peers.met) - before == 3 * len(plans)
    for name, grad in found.items():
        whole = expected_grads[name]
        if name in spans:
            assert_same(grad, whole[:, span.start : span.stop])
        else:
            assert_same(summed(peers, grad), whole)


@pytest.mark.parametrize("is_early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4], ids="P{}".format)
@pytest.mark.parametrize("count", [1, 2, 3, 9], ids="G{}".format)
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS, ids="H{}".format)
@pytest.mark.parametrize("feature", FEATURES)
def test_groups_are_attention_of_one_process(
    feature: str,
    query_heads: int,
    kv_heads: int,
    count: int,
    ranks: int,
    is_early: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_groups, "overlaps", lambda device: is_early)
    run(ranks, step, request_of(query_heads, kv_heads, **FEATURES[feature](query_heads)), count)
