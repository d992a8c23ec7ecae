"""Stage exchange: what one device can tell of the exchange, of fused losses, of compiling, and of FSDP2.

Packing and unpacking are those of one rank of eight, in a process group that sends nothing, so copying is timed: bytes
read and written, as a share of what a plain copy moves. Nothing is said of NCCL. Losses are of one LM head. The layer
that is compiled, and that a CUDA graph plays, has projections, exchange and attention, on shapes of one rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpu_stages import fused_losses, machine, one_layer, sharding
from gpu_stages.results import Results
from gpu_stages.shape import Shape
from sp_attention.distributed.peers import Peers
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

PEERS = 8
COPY = "a plain copy"


SHAPES = {
    "Llama-8B, 128k tokens": Shape(1, 131072, 32, 8, 128),
    "Llama-70B, 64k tokens": Shape(1, 65536, 64, 8, 128),
    "Qwen2.5-7B, 64k tokens, heads that 8 does not divide": Shape(1, 65536, 28, 4, 128),
    "Llama-8B, 4 rows of 16k tokens": Shape(4, 16384, 32, 8, 128),
}
REHEARSED = {"a small one": Shape(1, 512, 8, 2, 32), "heads that 8 does not divide": Shape(2, 256, 7, 1, 16)}


def run(results: Results, device: torch.device) -> None:
    results.note(" ".join((__doc__ or "").split()))
    with _group_that_sends_nothing():
        _packing(results, device, REHEARSED if machine.is_stand_in(device) else SHAPES)
        one_layer.run(results, device, _peers())
    fused_losses.run(results, device)
    sharding.run(results, device)


@contextmanager
def _group_that_sends_nothing() -> Iterator[None]:
    """torch's own for such."""
    dist.init_process_group("fake", rank=0, world_size=PEERS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _peers() -> Peers:
    group = dist.group.WORLD
    assert group is not None
    return Peers(group, 0, PEERS)


def _packing(results: Results, device: torch.device, shapes: dict[str, Shape]) -> None:
    largest = max(shape.batch * shape.length * shape.heads * shape.size for shape in shapes.values())
    given = torch.randn(largest // PEERS * 4, device=device, dtype=torch.bfloat16)
    taken = torch.empty_like(given)

    def copy() -> dict[str, Any]:
        seconds = machine.seconds_of(lambda: taken.copy_(given), device, times=5)
        return {"GB/s": round(2 * given.nbytes / seconds / 1e9, 1)}

    table = "Packing and unpacking, one rank of 8"
    plain = results.row(table, {"shape": COPY, "step": "copy"}, copy)
    for name, shape in shapes.items():
        tensors = _tensors(shape, device)
        for step, (function, moved) in _steps(shape, tensors).items():
            measure = partial(_moving, function, moved, float(plain.get("GB/s", 0.0)), device)
            results.row(table, {"shape": name, "step": step}, measure)


def _moving(function: Callable[[], Any], moved: int, plain: float, device: torch.device) -> dict[str, Any]:
    seconds = machine.seconds_of(function, device, times=5)
    rate = moved / seconds / 1e9
    return {"GB/s": round(rate, 1), "share of a copy": round(rate / plain, 2) if plain else "", "ms": seconds * 1e3}


def _tensors(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """This rank's queries, keys and values."""
    mine = len(_peers().span(shape.length))
    return tuple(
        torch.randn(shape.batch, mine, heads, shape.size, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )


def _steps(shape: Shape, tensors: tuple[Tensor, ...]) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name a step, and the bytes that it reads and writes in copies of ours.

    What is sent is packed, what arrives is used where it is; of what comes back, the reverse.
    """
    plan, peers = head_plan(shape.heads, shape.kv_heads, PEERS), _peers()
    arrived = seq_to_head(*tensors, shape.length, plan, peers)
    out = arrived[0].detach().clone().requires_grad_()
    back = head_to_seq(out, plan, peers)
    q, k, v = (tensor.nbytes for tensor in tensors)
    everything = 2 * (q + _copies(shape, plan) * (k + v))

    def to_heads() -> None:
        with torch.no_grad():
            seq_to_head(*tensors, shape.length, plan, peers)

    def to_sequence() -> None:
        with torch.no_grad():
            head_to_seq(out, plan, peers)

    return {
        "to heads": (to_heads, int(everything)),
        "to heads, backward": (
            lambda: torch.autograd.grad(arrived, tensors, [one.detach() for one in arrived], retain_graph=True),
            int(2 * everything),
        ),
        "to sequence": (to_sequence, 2 * q),
        "to sequence, backward": (lambda: torch.autograd.grad(back, out, back.detach(), retain_graph=True), 2 * q),
    }


def _copies(shape: Shape, plan: HeadPlan) -> float:
    """How often a KV head is sent, since several ranks may need one."""
    return sum(map(len, plan.kv)) / shape.kv_heads
