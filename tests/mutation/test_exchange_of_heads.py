"""The exchange on threads: where every element goes and comes back, its gradients, and what is refused."""

from itertools import product
from typing import Any

import pytest
import torch
from thread_ranks import ThreadPeers, run
from torch import Tensor

from sp_attention.ulysses import all_to_all
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head, to_heads
from sp_attention.ulysses.buffer_layout import buffer_layout
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

# Even, uneven, groups that span ranks, one KV head, fewer heads than ranks.
HEADS = [(4, 4), (6, 3), (7, 7), (5, 1), (6, 2), (2, 1), (12, 6)]
RANKS = [2, 3, 4]


def numbered(batch: int, length: int, heads: int, size: int, first: int) -> Tensor:
    """[B, S, H, D] in which every element names its place."""
    count = batch * length * heads * size
    return torch.arange(first, first + count, dtype=torch.float64).view(batch, length, heads, size)


def cut(whole: Tensor, span: range) -> Tensor:
    return whole[:, span.start : span.stop]


def of_heads(whole: Tensor, heads: range) -> Tensor:
    return whole[:, :, heads.start : heads.stop]


def added_up(grads: list[Tensor], heads: tuple[range, ...], like: Tensor) -> Tensor:
    """What each rank has of its heads → the sum of all, of all heads."""
    total = torch.zeros_like(like)
    for grad, mine in zip(grads, heads, strict=True):
        of_heads(total, mine).add_(grad)
    return total


def assert_gradients(
    peers: ThreadPeers,
    arrived: tuple[Tensor, ...],
    mine: list[Tensor],
    held: tuple[tuple[range, ...], ...],
    whole: list[Tensor],
) -> None:
    """Each rank has gradients of its own for its heads; those of one head, on all its ranks, are added up."""
    downs = [
        [numbered(*of.shape[:2], len(heads[rank]), of.shape[3], 7 * rank + 1) for rank in range(peers.size)]
        for heads, of in zip(held, whole, strict=True)
    ]
    own = [down[peers.rank] for down in downs]
    # Batch before tokens in memory, and tokens before batch, in which they travel.
    for given in (own, [down.transpose(0, 1).contiguous().transpose(0, 1) for down in own]):
        found = torch.autograd.grad(arrived, mine, given, retain_graph=True)
        for grad, down, heads, of in zip(found, downs, held, whole, strict=True):
            assert torch.equal(grad, cut(added_up(down, heads, of), peers.span(of.shape[1])))


def there_and_back(peers: ThreadPeers, plan: HeadPlan, batch: int, length: int, strided: bool) -> None:
    kv_heads = plan.kv[-1].stop
    whole = [
        numbered(batch, length, plan.query[-1].stop, 4, 0),
        numbered(batch, length, kv_heads, 4, 10**4),
        numbered(batch, length, kv_heads, 3, 10**5),
    ]
    span = peers.span(length)
    mine = [cut(tensor, span) for tensor in whole]
    if strided:
        mine = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in mine]
    mine = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in mine]
    arrived = seq_to_head(*mine, length, plan, peers)
    held = (plan.query, plan.kv, plan.kv)
    for tensor, heads, of in zip(arrived, held, whole, strict=True):
        assert torch.equal(tensor, of_heads(of, heads[peers.rank]))
    back = head_to_seq(arrived[0], plan, peers)
    assert torch.equal(back, mine[0])
    assert back.is_contiguous()
    assert torch.equal(head_to_seq(arrived[0].contiguous(), plan, peers), mine[0])
    assert_gradients(peers, arrived, mine, held, whole)
    # And of the way back: that of my heads is what all ranks have of theirs.
    down = numbered(batch, length, plan.query[-1].stop, 4, 5)
    out = arrived[0].detach().requires_grad_()
    (grad,) = torch.autograd.grad(head_to_seq(out, plan, peers), out, cut(down, span))
    assert torch.equal(grad, of_heads(down, plan.query[peers.rank]))


@pytest.mark.parametrize("ranks", RANKS, ids="P{}".format)
@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS, ids="H{}".format)
def test_every_element_and_its_gradient_arrive(query_heads: int, kv_heads: int, ranks: int) -> None:
    plan = head_plan(query_heads, kv_heads, ranks)
    for batch, length, strided in ((1, 7, False), (3, 12, True), (2, ranks, False)):
        run(ranks, there_and_back, plan, batch, length, strided)


@pytest.mark.parametrize(("length", "heads"), [(18, (9, 9)), (18, (18, 3)), (20, (9, 9)), (18, (5, 1)), (18, (10, 10))])
def test_many_ranks_exchange_alike(length: int, heads: tuple[int, int]) -> None:
    run(9, there_and_back, head_plan(*heads, 9), 2, length, False)


def one_and_several(peers: ThreadPeers) -> list[tuple[int, ...]]:
    """Tensors of other kinds, alone and together."""
    plan, length = head_plan(3, 3, peers.size), 9
    for kinds in (("query",), ("kv",), ("stored", "query"), ("kv", "stored", "query", "kv")):
        whole = [numbered(2, length, 3, 2 + number, 100 * number) for number in range(len(kinds))]
        mine = [cut(tensor, peers.span(length)).clone().requires_grad_() for tensor in whole]
        arrived = to_heads(tuple(mine), plan, kinds, length, peers)
        held = tuple(getattr(plan, kind) for kind in kinds)
        for tensor, heads, of in zip(arrived, held, whole, strict=True):
            assert torch.equal(tensor, of_heads(of, heads[peers.rank]))
        assert_gradients(peers, arrived, mine, held, whole)
    return peers.met


def test_tensors_of_any_kinds_travel_together() -> None:
    for met in run(2, one_and_several):
        assert met == [(kind, 9, 2, widths) for widths in (6, 6, 15, 42) for kind in (5, 6, 6)]
    run(4, one_and_several)


def announced(peers: ThreadPeers) -> list[tuple[int, ...]]:
    plan = head_plan(4, 2, peers.size)
    query, key = (numbered(3, len(peers.span(7)), heads, 2, 0).requires_grad_() for heads in (4, 2))
    mine, keys, values = seq_to_head(query, key, key, 7, plan, peers)
    (head_to_seq(mine, plan, peers).sum() + keys.sum() + values.sum()).backward()
    return peers.met


def test_every_collective_is_announced_with_what_all_know() -> None:
    for met in run(2, announced):
        assert met[:2] == [(5, 7, 3, 16), (6, 7, 3, 8)]
        assert sorted(met[2:]) == [(5, 7, 3, 8), (6, 7, 3, 16)]


def refused(peers: ThreadPeers) -> list[str]:
    plan = head_plan(4, 2, peers.size)
    query, key = torch.zeros(1, 3, 4, 2), torch.zeros(1, 3, 2, 2)
    attempts: list[Any] = [
        lambda: seq_to_head(query, key, key, 8, plan, peers),
        lambda: seq_to_head(query, key, key.double(), 6, plan, peers),
        lambda: seq_to_head(query, key.double(), key, 6, plan, peers),
        lambda: seq_to_head(query, query, key, 6, plan, peers),
        lambda: seq_to_head(query, key, query, 6, plan, peers),
        lambda: to_heads((key, key), plan, ("kv",), 6, peers),
        lambda: head_to_seq(query, plan, peers),
    ]
    texts = []
    for attempt in attempts:
        with pytest.raises(ValueError) as error:  # noqa: PT011  # the texts are compared below
            attempt()
        texts.append(str(error.value))
    assert not peers.met
    return texts


def test_what_does_not_fit_is_refused_before_anything_is_sent() -> None:
    texts = run(2, refused)
    assert texts[0] == texts[1]
    of = "does not fit 3 of 6 tokens, 2 heads and torch.float32"
    assert [text for number, text in enumerate(texts[0]) if number != 5] == [
        "a tensor torch.float32 [1, 3, 4, 2] does not fit 4 of 8 tokens, 4 heads and torch.float32",
        f"a tensor torch.float64 [1, 3, 2, 2] {of}",
        f"a tensor torch.float64 [1, 3, 2, 2] {of}",
        f"a tensor torch.float32 [1, 3, 4, 2] {of}",
        f"a tensor torch.float32 [1, 3, 4, 2] {of}",
        "an output [1, 3, 4, 2] does not hold this rank's 2 heads",
    ]


@pytest.mark.parametrize("compiling", [False, True])
def test_layouts_are_kept_unless_a_compiler_keeps_them(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    shape = head_plan(4, 2, 2), ("query",), (4,), 2, 7, 0
    assert all_to_all._layout(*shape) == buffer_layout.__wrapped__(*shape)
    assert buffer_layout.cache_info().currsize == (not compiling)


def test_ranges_of_what_travels_follow_each_other() -> None:
    for ranks, me in product((2, 3, 4), (0, 1)):
        layout = buffer_layout(head_plan(7, 7, ranks), ("query",), (2,), 3, 9, me)
        travelling = torch.arange(layout.travelling)
        parts = list(all_to_all._rank_ranges(travelling, 3, layout))
        assert [one for one, _ in parts] == list(layout.ranges)
        assert [part is None for _, part in parts] == [one.is_own for one in layout.ranges]
        assert torch.equal(torch.cat([part.flatten() for _, part in parts if part is not None]), travelling)
