"""The exchange: where every element goes, what comes back, and its gradients."""

import pytest
import torch
import torch.distributed as dist
from helpers import WholeOnEveryRank, world
from torch import Tensor

from sp_attention.distributed.collectives import gather
from sp_attention.distributed.peers import Peers
from sp_attention.launch import run_ranks
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

# (query heads, KV heads): even, uneven, groups that span ranks, one KV head, fewer heads than ranks.
# Of the last, on four ranks, neighbours share one of their two key heads.
HEADS = [(4, 4), (6, 3), (7, 7), (5, 1), (8, 2), (2, 1), (12, 6)]


def tagged(batch: int, length: int, heads: int, size: int, tag: float) -> Tensor:
    """[B, S, H, D] in which every element names its place."""
    shape = (batch, length, heads, size)
    return torch.arange(batch * length * heads * size, dtype=torch.float64).view(shape) + tag


def cut(whole: Tensor, span: range) -> Tensor:
    return whole[:, span.start : span.stop]


def check_places(peers: Peers) -> int:
    """Every element of q, k and v arrives at its (b, s, h, d), and comes back bit for bit; the number of cases."""
    cases = 0
    for batch in (1, 2, 3):
        for length in (peers.size, 7, 12):
            for query_heads, kv_heads in HEADS:
                for strided in (False, True):
                    whole = [
                        tagged(batch, length, query_heads, 4, 0.25),
                        tagged(batch, length, kv_heads, 4, 0.5),
                        tagged(batch, length, kv_heads, 3, 0.75),
                    ]
                    plan, span = head_plan(query_heads, kv_heads, peers.size), peers.span(length)
                    mine = [cut(tensor, span) for tensor in whole]
                    if strided:
                        mine = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in mine]
                    arrived = seq_to_head(*mine, length, plan, peers)
                    held = (plan.query[peers.rank], plan.kv[peers.rank], plan.kv[peers.rank])
                    for tensor, heads, of in zip(arrived, held, whole, strict=True):
                        assert torch.equal(tensor, of[:, :, heads.start : heads.stop])
                    assert torch.equal(head_to_seq(arrived[0], plan, peers), mine[0])
                    back = head_to_seq(arrived[0].transpose(1, 2).contiguous().transpose(1, 2), plan, peers)
                    assert torch.equal(back, mine[0])
                    assert back.is_contiguous()
                    assert torch.equal(gather(mine[2], length, peers), whole[2])
                    cases += 1
    return cases


def check_places_in_world() -> int:
    return check_places(world())


@pytest.mark.parametrize("ranks", [2, 3, 4], ids="P{}".format)
def test_every_element_arrives_where_the_plan_says_and_comes_back(ranks: int) -> None:
    assert run_ranks(ranks, check_places_in_world) == [3 * 3 * len(HEADS) * 2] * ranks


def check_places_in_groups() -> int:
    members = [[0, 2], [1, 3]]
    groups = [dist.new_group(ranks) for ranks in members]
    which = dist.get_rank() % 2
    return check_places(Peers(groups[which], members[which].index(dist.get_rank()), 2))


def test_groups_that_are_not_the_world_exchange_among_themselves() -> None:
    assert all(run_ranks(4, check_places_in_groups))


def check_many() -> bool:
    """Of more ranks than keep their own tokens: equal shares, heads of several ranks, and ranks without heads."""
    peers = world()
    for length, query_heads, kv_heads in ((18, 9, 9), (18, 18, 3), (20, 9, 9), (18, 5, 1)):
        whole = [tagged(2, length, heads, 4, part) for heads, part in ((query_heads, 0.25), (kv_heads, 0.5))]
        plan = head_plan(query_heads, kv_heads, peers.size)
        query, key = (cut(tensor, peers.span(length)).requires_grad_() for tensor in whole)
        mine, keys, values = seq_to_head(query, key, key, length, plan, peers)
        heads, kv_heads_here = plan.query[peers.rank], plan.kv[peers.rank]
        assert torch.equal(mine, whole[0][:, :, heads.start : heads.stop])
        assert torch.equal(keys, whole[1][:, :, kv_heads_here.start : kv_heads_here.stop])
        (head_to_seq(mine, plan, peers).sum() + keys.sum() + values.sum()).backward()
        holders = torch.tensor([sum(one.start <= head < one.stop for one in plan.kv) for head in range(kv_heads)])
        assert torch.equal(query.grad, torch.ones_like(query))
        assert torch.equal(key.grad, (2.0 * holders)[:, None].expand_as(key).to(key.dtype))
    return True


def test_many_ranks_exchange_alike() -> None:
    assert all(run_ranks(9, check_many))


def attention_of_whole(query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, peers: Peers) -> Tensor:
    """Whole q, k, v on every rank → cut, exchanged, used, exchanged back, gathered: a function of whole tensors."""
    length, span = query.shape[1], peers.span(query.shape[1])
    mine = [cut(WholeOnEveryRank.apply(tensor), span) for tensor in (query, key, value)]
    query, key, value = seq_to_head(*mine, length, plan, peers)
    places = torch.tensor(plan.kv_of_query(peers.rank), dtype=torch.int64)
    # Nonlinear, and every KV head matters to every query head that uses it.
    mixed = query * key.index_select(2, places) + value.index_select(2, places).cumsum(1) ** 2
    return gather(head_to_seq(mixed, plan, peers), length, peers)


def check_gradients(query_heads: int, kv_heads: int) -> bool:
    peers = world()
    torch.manual_seed(0)
    whole = [torch.randn(2, 5, heads, 2, dtype=torch.float64) for heads in (query_heads, kv_heads, kv_heads)]
    plan = head_plan(query_heads, kv_heads, peers.size)
    inputs = [tensor.requires_grad_() for tensor in whole]
    return torch.autograd.gradcheck(lambda q, k, v: attention_of_whole(q, k, v, plan, peers), inputs)


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(3, 1), (4, 2), (2, 2)], ids="H{}".format)
def test_gradients_of_the_exchange_are_numerically_right(ranks: int, query_heads: int, kv_heads: int) -> None:
    assert all(run_ranks(ranks, check_gradients, query_heads, kv_heads))


def check_compiles() -> bool:
    peers, length = world(), 9
    plan = head_plan(6, 3, peers.size)
    share = len(peers.span(length))

    def exchanged(query: Tensor, key: Tensor) -> Tensor:
        mine, _, values = seq_to_head(query, key, 2 * key, length, plan, peers)
        return head_to_seq(mine * values.sum(), plan, peers) + gather(key, length, peers).sum()

    compiled = torch.compile(exchanged, fullgraph=True, backend="aot_eager")
    results = []
    for function in (exchanged, compiled):
        torch.manual_seed(0)
        query = torch.randn(2, share, 6, 4, requires_grad=True)
        key = torch.randn(2, share, 3, 4, requires_grad=True)
        out = function(query, key)
        out.sum().backward()
        results.append((out, query.grad, key.grad))
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_compiles_into_one_graph_with_the_same_bits() -> None:
    assert all(run_ranks(2, check_compiles, timeout=120))


def check_refusals() -> list[str]:
    peers, plan = world(), head_plan(4, 2, 2)
    query, key = torch.zeros(1, 3, 4, 2), torch.zeros(1, 3, 2, 2)
    texts = []
    for attempt in (
        lambda: seq_to_head(query, key, key, 8, plan, peers),
        lambda: seq_to_head(query, key, key.double(), 6, plan, peers),
        lambda: seq_to_head(query, query, key, 6, plan, peers),
        lambda: head_to_seq(query, plan, peers),
    ):
        with pytest.raises(ValueError, match="does not") as refusal:
            attempt()
        texts.append(str(refusal.value))
    return texts


def test_shapes_that_do_not_fit_are_an_error_before_anything_is_sent() -> None:
    first = run_ranks(2, check_refusals)[0]
    assert first[1] == "a tensor torch.float64 [1, 3, 2, 2] does not fit 3 of 6 tokens, 2 heads and torch.float32"
    assert first[3] == "an output [1, 3, 4, 2] does not hold this rank's 2 heads"
