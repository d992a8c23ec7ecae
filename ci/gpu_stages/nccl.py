"""Stage nccl: every collective that the library calls, on a group of one rank: that it starts.

A group of one sends nothing to anyone. What it shows is that the backend has the collective, takes these dtypes, and
empty tensors and empty splits; it shows nothing of several devices.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sp_attention
from gpu_stages import machine
from gpu_stages.results import RIGHT, WRONG, Results
from sp_attention.distributed import collectives
from sp_attention.distributed.peers import Peers
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head
from sp_attention.ulysses.head_plan import head_plan

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8)
# Elements of a tensor: some, and none, as ranks without tokens or heads have.
SIZES = (6, 0)

Call = Callable[[Tensor], Tensor]


def _all_to_all(given: Tensor, *splits: list[int]) -> Tensor:
    received = torch.empty_like(given)
    dist.all_to_all_single(received, given, *splits)
    return received


def _all_gather(given: Tensor) -> Tensor:
    (received,) = found = [torch.empty_like(given)]
    dist.all_gather(found, given)
    return received


def _all_reduce(given: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    received = given.clone()
    dist.all_reduce(received, op=op)
    return received


# By the name that `torch.distributed` has for it, and what is different: what gives a tensor back as it is.
CALLS: dict[str, Call] = {
    "all_to_all_single": lambda given: _all_to_all(given, [len(given)], [len(given)]),
    "all_to_all_single, without splits": _all_to_all,
    "all_gather": _all_gather,
    "all_reduce": _all_reduce,
    "all_reduce, maximum": partial(_all_reduce, op=dist.ReduceOp.MAX),
}


def _objects() -> str:
    found: list[object] = [None]
    dist.all_gather_object(found, {"rank": 0})
    shared: list[object] = [("a", 1)]
    dist.broadcast_object_list(shared, src=0)
    return RIGHT if found == [{"rank": 0}] and shared == [("a", 1)] else f"{WRONG}: {found}, {shared}"


def _barrier() -> str:
    dist.barrier()
    return RIGHT


def _subgroups() -> str:
    mine, _ = dist.new_subgroups(1)
    return RIGHT if dist.get_world_size(mine) == 1 else f"{WRONG}: {dist.get_world_size(mine)} ranks"


# Those without a tensor of ours.
OTHERS: dict[str, Callable[[], str]] = {
    "all_gather_object and broadcast_object_list": _objects,
    "barrier": _barrier,
    "new_subgroups": _subgroups,
}


def run(results: Results, device: torch.device) -> None:
    results.note(" ".join((__doc__ or "").split()))
    backend = "gloo" if machine.is_stand_in(device) else dist.get_default_backend_for_device(device)
    if not machine.is_stand_in(device):
        torch.get_device_module(device).set_device(device.index or 0)
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=max(results.left, 1.0))
    )
    results.facts["process group"] = f"{backend}, one rank"
    for name, call in CALLS.items():
        for dtype in DTYPES:
            for size in SIZES:
                key = {"call": name, "dtype": str(dtype).removeprefix("torch."), "elements": str(size)}
                results.row("Collectives", key, partial(_called, call, dtype, size, device))
    for name, other in OTHERS.items():
        results.row("Collectives", {"call": name}, partial(_answer, other))
    for name, ours in OURS.items():
        for dtype in FLOATS:
            key = {"function": name, "dtype": str(dtype).removeprefix("torch.")}
            results.row("Functions of the library", key, partial(_ours, ours, dtype, device))
    dist.destroy_process_group()


def _answer(call: Callable[[], str]) -> dict[str, str]:
    return {"outcome": call()}


def _called(call: Call, dtype: torch.dtype, size: int, device: torch.device) -> dict[str, str]:
    given = torch.arange(size, device=device).to(dtype)
    received = call(given)
    machine.synchronize(device)
    return {"outcome": RIGHT if torch.equal(received, given) else f"{WRONG}: {received.tolist()}"}


def _peers() -> Peers:
    group = dist.group.WORLD
    assert group is not None
    return Peers(group, 0, 1)


def _exchange(given: Tensor) -> Tensor:
    plan = head_plan(3, 3, 1)
    query, *_ = seq_to_head(given, given, given, given.shape[1], plan, _peers())
    return head_to_seq(query, plan, _peers())


def _averaged(given: Tensor) -> Tensor:
    model = nn.Linear(1, 1, bias=False).to(given)
    model.weight.grad = given.detach().reshape(-1)[:1].view(1, 1).clone()
    sp_attention.average_gradients(model)
    return given * (model.weight.grad / given.detach().reshape(-1)[0])


# What gives a tensor [B, s, H, D] back as it is, with a gradient of ones, on one rank.
OURS: dict[str, Call] = {
    "exchange to heads and back": _exchange,
    "gather": lambda given: collectives.gather(given, given.shape[1], _peers()),
    "sum over ranks": lambda given: collectives.sum_over_ranks(given, _peers()),
    "average_gradients": _averaged,
}


def _ours(function: Call, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    given = torch.arange(1, 2 * 5 * 3 * 4 + 1, device=device).to(dtype).view(2, 5, 3, 4).requires_grad_()
    out = function(given)
    (gradient,) = torch.autograd.grad(out.sum(), given)
    machine.synchronize(device)
    right = torch.equal(out, given) and bool((gradient == 1).all())
    return {"outcome": RIGHT if right else f"{WRONG}: another tensor, or another gradient, comes back"}
