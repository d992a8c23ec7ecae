"""torch.compile: the numbers of one process, no break in the exchange, and compiled once for the same shapes."""

from typing import Any

import pytest
import torch
from helpers import largest_error, loss_step, relative_error, world
from models import MODELS
from torch import Tensor
from torch._dynamo.utils import counters

import sp_attention
from sp_attention.distributed.collectives import gather, sum_over_ranks
from sp_attention.launch import run_ranks
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head
from sp_attention.ulysses.head_plan import head_plan

pytestmark = pytest.mark.slow

LENGTH, HEADS, KV_HEADS = 7, 5, 1


def exchanged() -> list[float]:
    """Errors of a value that went through every exchange, and of its gradients, in one graph against none."""
    peers = world()
    plan = head_plan(HEADS, KV_HEADS, peers.size)

    def through(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
        query, key, value = seq_to_head(query, key, value, LENGTH, plan, peers)
        out = head_to_seq(query * (key + value).sum(2, keepdim=True).cumsum(1), plan, peers)
        return (gather(out, LENGTH, peers) * weights).sum() + sum_over_ranks(out.sum(), peers)

    torch.manual_seed(peers.rank)
    parts = [
        torch.randn(2, len(peers.span(LENGTH)), heads, 4, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    weights = torch.linspace(-1, 1, 4, dtype=torch.float64)
    results = []
    for function in (through, torch.compile(through, backend="aot_eager", fullgraph=True)):
        value = function(*parts, weights)
        results.append([value.detach(), *torch.autograd.grad(value, parts)])
    return [relative_error(compiled, plain) for plain, compiled in zip(*results, strict=True)]


def test_the_exchange_is_one_graph() -> None:
    for errors in run_ranks(3, exchanged, timeout=120):
        assert max(errors) < 1e-12


def trained(compiled_first: bool) -> dict[str, Any]:
    """Three steps of a compiled model and of one process."""
    tiny = MODELS["mistral-window5"]
    reference, model = tiny.build(), tiny.build()
    compiled = torch.compile(model, backend="aot_eager") if compiled_first else model
    sp_attention.enable(compiled, backend="sdpa")
    if not compiled_first:
        compiled = torch.compile(model, backend="aot_eager")
    errors, graphs = [], []
    for _ in range(3):
        reference.zero_grad()
        compiled.zero_grad()
        errors.append(largest_error(reference, compiled, loss_step))
        graphs.append(counters["stats"]["unique_graphs"])
    return {"error": max(errors), "graphs": graphs, "breaks": [*counters["graph_break"]]}


@pytest.mark.parametrize("compiled_first", [False, True], ids=["mistral, enabled first", "mistral, compiled first"])
def test_a_compiled_model_gives_the_same_and_is_compiled_once(compiled_first: bool) -> None:
    for found in run_ranks(2, trained, compiled_first, timeout=240):
        assert found["error"] < 1e-5
        first, *later = found["graphs"]
        assert first > 4  # norms, projections, MLP: what is between the hooks
        assert later == [first, first]
        # Ours, which are to run as they are, and nothing else.
        assert found["breaks"]
        assert all("torch.compiler.disable" in reason for reason in found["breaks"])
