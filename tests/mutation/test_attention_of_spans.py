"""The Ulysses step on threads, against attention written out in one process, in float64, with every gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from thread_ranks import OnADevice, ThreadPeers, random, run
from torch import Tensor, nn

from sp_attention import testing
from sp_attention.errors import BackendError
from sp_attention.kernels.request import Backend, Mask, Request
from sp_attention.ulysses import attention
from sp_attention.ulysses.attention import (
    Kernel,
    attend,
    attend_cached,
    attend_my_heads,
    attend_to_whole_keys,
    cut_to_heads,
    cut_to_queries,
    requests_of_all_ranks,
    require_done,
)
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

LENGTH, SIZE, VALUE_SIZE = 7, 4, 3
# Of the third, on four ranks, one has heads of two groups; of the last, some have none.
HEADS = [(6, 3), (5, 1), (6, 2), (2, 1)]
CPU = torch.device("cpu")
PLAIN = Backend("cpu", "plain", testing.attend, attend_with_weights=testing.attend_with_weights)


def request_of(heads: int, kv_heads: int, queries: int = LENGTH, **features: Any) -> Request:
    causal = {"offset": LENGTH - queries} if queries < LENGTH else {}
    return Request(
        random(2, queries, heads, SIZE, seed=1),
        random(2, LENGTH, kv_heads, SIZE, seed=2),
        random(2, LENGTH, kv_heads, VALUE_SIZE, seed=3),
        features.pop("mask", None) or Mask(2, queries, LENGTH, CPU, **causal),
        scale=0.4,
        **features,
    )


def of_heads(heads: int) -> Tensor:
    """A mask by head, of which every query sees itself."""
    return (random(2, heads, LENGTH, LENGTH, seed=4) > 0) | torch.eye(LENGTH, dtype=torch.bool)


FEATURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda heads: {},
    "softcap, padding": lambda heads: {
        "softcap": 1.5,
        "mask": Mask(2, LENGTH, LENGTH, CPU, padding=torch.arange(LENGTH) >= torch.tensor([[2], [0]])),
    },
    "sinks": lambda heads: {"sinks": random(heads, seed=5)},
    "bias": lambda heads: {"bias": random(2, heads, LENGTH, LENGTH, seed=6), "sinks": random(heads, seed=5)},
    "bias of all heads": lambda heads: {"bias": random(1, 1, 1, LENGTH, seed=6)},
    "mask by head": lambda heads: {
        "mask": Mask(2, LENGTH, LENGTH, CPU, causal=False, explicit=of_heads(heads)),
    },
}


def learned(request: Request) -> dict[str, Tensor]:
    named = {name: getattr(request, name) for name in ("query", "key", "value", "sinks", "bias")}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def of_rank(request: Request) -> Request:
    """The request with a mask of its own, as each process has one, which keeps what is derived from it."""
    return replace(request, mask=replace(request.mask))


def asking(request: Request) -> Request:
    """The same, of leaves of its own that want gradients."""
    return replace(
        of_rank(request), **{name: one.detach().clone().requires_grad_() for name, one in learned(request).items()}
    )


def gradients(out: Tensor, down: Tensor, request: Request) -> dict[str, Tensor]:
    inputs = learned(request)
    return dict(zip(inputs, torch.autograd.grad((out * down).sum(), [*inputs.values()]), strict=True))


def assert_same(ours: Tensor | None, expected: Tensor | None) -> None:
    assert (ours is None) == (expected is None)
    if ours is not None:
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def summed(peers: ThreadPeers, tensor: Tensor) -> Tensor:
    """Of what every rank has whole, each has the gradient of its own loss."""
    total = tensor.clone()
    peers.group.all_reduce(total)
    return total


def step(peers: ThreadPeers, request: Request, with_weights: bool) -> None:
    expected = asking(request)
    expected_out, expected_weights = testing.attend_with_weights(expected)
    down = random(*expected_out.shape, seed=8)
    expected_grads = gradients(expected_out, down, expected)

    span = peers.span(LENGTH)
    spans = {name: getattr(request, name)[:, span.start : span.stop] for name in ("query", "key", "value")}
    ours = asking(replace(request, **spans))
    plan = head_plan(request.query.shape[2], request.key.shape[2], peers.size)
    with OnADevice():
        out, weights = attend(ours, LENGTH, plan, peers, Kernel(PLAIN, with_weights))
    assert_same(out, expected_out[:, span.start : span.stop])
    assert_same(weights, expected_weights if with_weights else None)
    for name, grad in gradients(out, down[:, span.start : span.stop], ours).items():
        whole = expected_grads[name]
        if name in spans:
            assert_same(grad, whole[:, span.start : span.stop])
        else:
            assert_same(summed(peers, grad), whole)


@pytest.mark.parametrize("ranks", [2, 3, 4], ids="P{}".format)
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS, ids="H{}".format)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_step_is_attention_of_one_process(feature: str, query_heads: int, kv_heads: int, ranks: int) -> None:
    request = request_of(query_heads, kv_heads, **FEATURES[feature](query_heads))
    run(ranks, step, request, feature in ("causal", "sinks"))


def stored(request: Request, plan: HeadPlan, rank: int) -> Request:
    """The request with the keys and values that a rank keeps in its cache."""
    heads = plan.stored[rank]
    return replace(
        request, key=request.key[:, :, heads.start : heads.stop], value=request.value[:, :, heads.start : heads.stop]
    )


def cached_step(peers: ThreadPeers, request: Request, spread: bool, with_weights: bool) -> None:
    queries = request.query.shape[1]
    expected_out, expected_weights = testing.attend_with_weights(request)
    plan = head_plan(request.query.shape[2], request.key.shape[2], peers.size)
    span = peers.span(queries) if spread else range(queries)
    mine = replace(stored(of_rank(request), plan, peers.rank), query=request.query[:, span.start : span.stop])
    kernel = Kernel(PLAIN, with_weights)
    out, weights = attend_cached(mine, queries if spread else None, plan, peers, kernel)
    assert_same(out, expected_out[:, span.start : span.stop])
    assert_same(weights, expected_weights if with_weights else None)


@pytest.mark.parametrize("ranks", [2, 3, 4], ids="P{}".format)
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS, ids="H{}".format)
@pytest.mark.parametrize("spread", [True, False], ids=["spans", "whole"])
def test_new_tokens_attend_to_cached_heads(spread: bool, query_heads: int, kv_heads: int, ranks: int) -> None:
    for queries, with_weights in ((5, True), (1, False), (LENGTH, True)):
        request = request_of(query_heads, kv_heads, queries, sinks=random(query_heads, seed=5))
        run(ranks, cached_step, request, spread, with_weights)


def whole_keys_step(peers: ThreadPeers, request: Request, with_weights: bool) -> None:
    expected = asking(request)
    expected_out, expected_weights = testing.attend_with_weights(expected)
    span = peers.span(5)
    ours = asking(request)
    mine = replace(ours, query=ours.query[:, span.start : span.stop])
    out, weights = attend_to_whole_keys(mine, 5, peers, Kernel(PLAIN, with_weights))
    assert_same(out, expected_out[:, span.start : span.stop])
    assert_same(weights, expected_weights if with_weights else None)
    down = random(*expected_out.shape, seed=8)
    grads = gradients(out, down[:, span.start : span.stop], ours)
    for name, grad in gradients(expected_out, down, expected).items():
        assert_same(summed(peers, grads[name]), grad)


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
@pytest.mark.parametrize("bias", [(2, 5, LENGTH), (1, 1, LENGTH)], ids=["of queries", "of keys"])
def test_spans_of_queries_attend_to_whole_keys(bias: tuple[int, int, int], ranks: int) -> None:
    padding = torch.arange(LENGTH) < torch.tensor([[5], [7]])
    mask = Mask(2, 5, LENGTH, CPU, causal=False, padding=padding)
    request = request_of(3, 3, 5, mask=mask, bias=random(bias[0], 3, *bias[1:], seed=6))
    for with_weights in (True, False):
        run(ranks, whole_keys_step, request, with_weights)


def test_no_bias_is_cut_to_none() -> None:
    request = request_of(3, 3)
    cut = cut_to_queries(request, range(2, 5))
    assert cut.bias is None
    assert cut.mask is request.mask.rows(range(2, 5))


def test_a_request_is_cut_to_the_heads_of_a_rank() -> None:
    explicit = of_heads(5)
    module = nn.Module()
    request = request_of(
        5, 1, mask=Mask(2, LENGTH, LENGTH, CPU, explicit=explicit), sinks=torch.arange(5.0), module=module,
        bias=torch.arange(5.0)[None, :, None, None], dropout=0.25, softcap=2.0,
    )  # fmt: skip
    plan = head_plan(5, 1, 3)
    for rank, heads in enumerate((range(0, 2), range(2, 4), range(4, 5))):
        cut = cut_to_heads(request, plan, rank)
        assert (cut.heads, cut.all_heads) == (heads, 5)
        assert cut.sinks.tolist() == cut.bias.flatten().tolist() == [*map(float, heads)]
        assert torch.equal(cut.mask.explicit, explicit[:, heads.start : heads.stop])
        assert (cut.dropout, cut.softcap, cut.scale, cut.module) == (0.25, 2.0, 0.4, module)
    bare = cut_to_heads(replace(request, sinks=None, bias=torch.zeros(1, 1, 1, LENGTH)), plan, 1)
    assert bare.sinks is None
    assert bare.bias.shape == (1, 1, 1, LENGTH)
    assert cut_to_heads(replace(request, bias=None), plan, 1).bias is None


def empty_share(peers: ThreadPeers) -> tuple[Any, ...]:
    """What a rank without heads has, and the gradients that it gives all the same."""
    request = asking(request_of(1, 1, sinks=random(1), bias=random(1, 1, LENGTH, LENGTH)))
    plan = head_plan(1, 1, peers.size)
    heads = plan.query[peers.rank]
    mine = replace(cut_to_heads(request, plan, peers.rank), query=request.query[:, :, heads.start : heads.stop])
    out, weights = attend_my_heads(mine, plan, peers, Kernel(PLAIN, True))
    grads = gradients(out, torch.ones_like(out), request)
    return out.shape, weights.shape, {name: bool(grad.any()) for name, grad in grads.items()}


def test_a_rank_without_heads_takes_part_in_backward() -> None:
    (first, weights, grads), (second, others, none) = run(2, empty_share)
    assert (first, second) == ((2, LENGTH, 1, VALUE_SIZE), (2, LENGTH, 0, VALUE_SIZE))
    assert weights == others == (2, 1, LENGTH, LENGTH)
    assert grads == dict.fromkeys(("query", "key", "value", "sinks", "bias"), True)
    assert none == dict.fromkeys(grads, False)


def places(peers: ThreadPeers) -> dict[object, list[int]]:
    """Where each of my query heads has its KV head, as the mask keeps it for all layers."""
    request, plan = request_of(6, 3), head_plan(6, 3, peers.size)
    heads = plan.query[peers.rank]
    mine = stored(replace(request, query=request.query[:, :, heads.start : heads.stop]), plan, peers.rank)
    for _ in range(2):
        out, weights = attend_my_heads(mine, plan, peers, Kernel(PLAIN))
        assert weights is None
        assert_same(out, testing.attend(request)[:, :, heads.start : heads.stop])
    return {name: kept.tolist() for name, kept in mine.mask._derived.items() if name != "dense"}


def test_places_of_kv_heads_are_kept_with_the_mask() -> None:
    name = "kv of query", head_plan(6, 3, 2)
    assert run(2, places) == [{(*name, 0): [0, 0, 1]}, {(*name, 1): [0, 1, 1]}]
    assert run(3, places) == [{}, {}, {}]


def test_requests_of_all_ranks_have_shapes_and_no_memory() -> None:
    request = request_of(6, 2, 4, sinks=torch.arange(6.0))
    of_span = replace(request, query=request.query[:, :2], key=request.key[:, :3], value=request.value[:, :3])
    requests = requests_of_all_ranks(of_span, head_plan(6, 2, 4))
    assert [
        (tuple(one.query.shape), tuple(one.key.shape), tuple(one.value.shape), one.heads, one.sinks.tolist())
        for one in requests
    ] == [
        ((2, 4, 2, SIZE), (2, LENGTH, 1, SIZE), (2, LENGTH, 1, VALUE_SIZE), range(0, 2), [0, 1]),
        ((2, 4, 2, SIZE), (2, LENGTH, 2, SIZE), (2, LENGTH, 2, VALUE_SIZE), range(2, 4), [2, 3]),
        ((2, 4, 1, SIZE), (2, LENGTH, 1, SIZE), (2, LENGTH, 1, VALUE_SIZE), range(4, 5), [4]),
    ]
    for one in requests:
        for tensor in (one.query, one.key, one.value):
            assert tensor.dtype == torch.float64
            assert tensor.stride(-1) == 1
            assert tensor.untyped_storage().nbytes() == tensor.shape[-1] * 8


def picky(kernel: str, reason: str | None, with_weights: bool = True) -> Backend:
    return Backend(
        "cpu",
        kernel,
        testing.attend,
        refuses=lambda request: reason if request.query.shape[2] == 2 else None,
        attend_with_weights=testing.attend_with_weights if with_weights else None,
    )


def test_a_kernel_that_does_not_do_it_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[Backend] = []

    def usable(device: str) -> tuple[Backend, ...]:
        assert device == "cpu"
        return tuple(offered)

    monkeypatch.setattr(attention, "usable", usable)
    # Of the second, the kernel is asked for two heads, which it does not do.
    requests = [request_of(heads, 1) for heads in (3, 2)]
    lazy = picky("lazy", "it is tired")
    require_done(requests[:1], Kernel(lazy), "layer")
    require_done(requests, Kernel(picky("good", None)), "layer")
    with pytest.raises(BackendError) as error:
        require_done(requests, Kernel(lazy), "layer")
    cannot = "layer: kernel 'lazy' on cpu cannot do this: it is tired. "
    assert str(error.value) == f"{cannot}Installed kernels that can: none."
    offered[:] = [lazy, picky("good", None, with_weights=False), picky("better", None)]
    with pytest.raises(BackendError) as error:
        require_done(requests, Kernel(lazy), "layer")
    assert str(error.value) == f'{cannot}Use enable(model, backend="good"). Installed kernels that can: good, better.'
    # Others have to give weights too where they are asked for.
    with pytest.raises(BackendError) as error:
        require_done(requests, Kernel(lazy, with_weights=True), "layer")
    assert str(error.value) == f'{cannot}Use enable(model, backend="better"). Installed kernels that can: better.'
    with pytest.raises(BackendError) as error:
        require_done(requests, Kernel(offered[1], with_weights=True), "layer")
    assert str(error.value) == (
        "layer: kernel 'good' on cpu cannot do this: it has no attention weights to return (output_attentions=True). "
        'Use enable(model, backend="better"). Installed kernels that can: better.'
    )


def test_a_kernel_gives_weights_where_they_are_wanted() -> None:
    request = request_of(3, 3)
    out, weights = testing.attend_with_weights(request)
    assert Kernel(PLAIN)(request)[1] is None
    assert torch.equal(Kernel(PLAIN)(request)[0], out)
    assert torch.equal(Kernel(PLAIN, with_weights=True)(request)[1], weights)
    with pytest.raises(AssertionError):
        Kernel(replace(PLAIN, attend_with_weights=None), with_weights=True)(request)
