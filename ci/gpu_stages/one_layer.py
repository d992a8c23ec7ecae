"""Of stage exchange: a layer of one rank of eight, compiled, and played by a CUDA graph."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpu_stages import machine
from gpu_stages.results import RIGHT, WRONG, Results
from sp_attention.distributed.peers import Peers
from sp_attention.kernels.request import Mask, Request
from sp_attention.kernels.sdpa import attend
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head
from sp_attention.ulysses.head_plan import head_plan

HEADS, KV_HEADS = 32, 8
# Tokens of the whole, and the size of a head.
SIZES, REHEARSED = (16384, 128), (512, 32)


class Layer(nn.Module):
    """Projections, the exchange, attention and the way back, of one rank of eight."""

    def __init__(self, length: int, size: int, peers: Peers) -> None:
        super().__init__()
        self.length, self.size, self.width = length, size, HEADS * size
        self.qkv = nn.Linear(self.width, (HEADS + 2 * KV_HEADS) * size, bias=False)
        self.out = nn.Linear(self.width, self.width, bias=False)
        self.plan, self.peers = head_plan(HEADS, KV_HEADS, peers.size), peers

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, s, E] → [1, s, E], of my span."""
        query, key, value = self.qkv(hidden).unflatten(2, (-1, self.size)).split([HEADS, KV_HEADS, KV_HEADS], 2)
        arrived = seq_to_head(query, key, value, self.length, self.plan, self.peers)
        mask = Mask(1, self.length, self.length, hidden.device)
        out = attend(Request(*arrived, mask, self.size**-0.5))
        result: Tensor = self.out(head_to_seq(out, self.plan, self.peers).flatten(2))
        return result


def run(results: Results, device: torch.device, peers: Peers) -> None:
    length, size = REHEARSED if machine.is_stand_in(device) else SIZES
    torch.manual_seed(0)
    layer = Layer(length, size, peers).to(device, torch.bfloat16)
    mine = len(peers.span(length))
    hidden = torch.randn(1, mine, layer.width, device=device, dtype=torch.bfloat16, requires_grad=True)
    # In a group that sends nothing, what arrives is whatever lies in the buffer.
    with patch.object(dist, "all_to_all_single", _zeros):
        expected = _pass(layer, hidden)
        for name, made in (("as it is", _as_it_is), ("torch.compile", _compiled), ("CUDA graph", _graphed)):
            key = {"layer": name}
            results.row("A layer, compiled and as a graph", key, partial(_layer, made, layer, hidden, expected, device))


def _zeros(output: Tensor, *given: Any, **options: Any) -> None:
    output.zero_()


def _pass(layer: Callable[[Tensor], Tensor], hidden: Tensor) -> list[Tensor]:
    """Output and gradient."""
    out = layer(hidden)
    return [out.detach(), *torch.autograd.grad(out.float().sum(), hidden)]


def _as_it_is(layer: Layer, hidden: Tensor) -> Callable[[], list[Tensor]]:
    return partial(_pass, layer, hidden)


def _compiled(layer: Layer, hidden: Tensor) -> Callable[[], list[Tensor]]:
    made = torch.compile(layer, backend="aot_eager" if machine.is_stand_in(hidden.device) else "inductor")
    return partial(_pass, made, hidden)


def _graphed(layer: Layer, hidden: Tensor) -> Callable[[], list[Tensor]]:
    if machine.is_stand_in(hidden.device):
        return partial(_pass, layer, hidden)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            _pass(layer, hidden)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = _pass(layer, hidden)

    def replay() -> list[Tensor]:
        graph.replay()
        return held

    return replay


def _layer(
    made: Callable[..., Any], layer: Layer, hidden: Tensor, expected: list[Tensor], device: torch.device
) -> dict[str, Any]:
    step = made(layer, hidden)
    found = [one.clone() for one in step()]
    pairs = zip(found, expected, strict=True)
    worst = max(float((a - b).float().abs().max() / b.float().abs().max()) for a, b in pairs)
    return {
        "outcome": f"{RIGHT if worst <= 2e-2 else WRONG}: off by {worst:.1e}",
        "ms": machine.seconds_of(step, device) * 1e3,
    }
