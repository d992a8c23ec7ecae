"""The Ulysses step for a group of heads at a time: exchange, kernel and exchange back, computed again in backward.

So queries, keys, values and the output of one group exist at a time in the layout of the kernel, besides those of all
heads of my span. Ghadia et al. 2026, "Untied Ulysses" (arXiv 2602.21196), have stages of heads in the same way; here it
is at the level of the attention interface, for any kernel, so k and v of a KV head that several groups need travel with
each. Where the next group may travel while this one computes, there are two groups at a time.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sp_attention.distributed import rng
from sp_attention.distributed.once_differentiable import once_differentiable
from sp_attention.distributed.partition import span_of, spans
from sp_attention.distributed.peers import Peers
from sp_attention.kernels.autocast import autocast_of_now
from sp_attention.kernels.request import Request
from sp_attention.ulysses.all_to_all import back_to_sequence, exchange_to_heads, start_to_heads
from sp_attention.ulysses.attention import Kernel, attend_arrived, cut_to_heads
from sp_attention.ulysses.grid import Grid, Rows, exchange_to_grid, return_from_grid
from sp_attention.ulysses.head_plan import HeadPlan

# How many groups: a number, or as many as `groups_for` makes of bytes.
HeadGroups = int | Literal["auto"]
# Bytes that "auto" lets a group have at most in the layout of the kernel, where its heads can be that few: as in tiles
# of logits, beside which kernels and collectives are no slower for being called more often.
_GROUP = 2**26
_QKV: tuple[Rows, ...] = ("query", "kv", "kv")
# Tensors in the layout of the kernel, or in that of spans.
Moved = tuple[Tensor, ...]


@cache
def head_groups(query_heads: int, kv_heads: int, count: int) -> HeadPlan:
    """At most `count` groups of neighbouring heads, as a plan whose ranks are the groups.

    A group has whole KV heads with all of their query heads, or query heads of one KV head only.
    """
    per_kv = query_heads // kv_heads
    whole = [range(kv.start * per_kv, kv.stop * per_kv) for kv in spans(kv_heads, min(count, kv_heads))]
    parts = max(1, min(count // kv_heads, per_kv))
    query = tuple(
        range(heads.start + part.start, heads.start + part.stop)
        for heads in whole
        for part in (span_of(index, len(heads), parts) for index in range(parts))
    )
    kv = tuple(range(heads.start // per_kv, (heads.stop - 1) // per_kv + 1) for heads in query)
    return HeadPlan(query, kv, per_kv)


def most_groups(request: Request, ranks: int) -> int:
    """How many groups there can be with a head for each rank in each of them, at least one."""
    return max(1, request.query.shape[2] // ranks)


def groups_for(request: Request, length: int, ranks: int) -> int:
    """How many groups "auto" makes: so many that what a rank has of one is 64 MiB, and none that leaves a rank idle."""
    numbers = sum(one.shape[2] * one.shape[3] for one in (request.query, request.key, request.value))
    numbers += request.query.shape[2] * request.value.shape[3]  # the output
    size = request.query.shape[0] * length * numbers * request.query.element_size() // ranks
    return min(most_groups(request, ranks), max(1, -(-size // _GROUP)))


def in_groups(request: Request, count: int) -> list[Request]:
    """The requests of the groups, each with the heads of q, k, v and all else that are its own; views."""
    plan = head_groups(request.query.shape[2], request.key.shape[2], count)
    if len(plan.query) == 1:
        return [request]
    return [
        replace(
            cut_to_heads(request, plan, group),
            query=_heads(request.query, query),
            key=_heads(request.key, kv),
            value=_heads(request.value, kv),
        )
        for group, (query, kv) in enumerate(zip(plan.query, plan.kv, strict=True))
    ]


def attend_in_groups(
    request: Request, length: int, plans: Sequence[HeadPlan | Grid], peers: Peers, kernel: Kernel
) -> Tensor:
    """`ulysses.attention.attend` without weights, with a plan for each of the groups of `in_groups`: [B, s, H, Dv].

    Two collectives a group, and three in backward.
    """
    seed = int(torch.randint(2**62, ())) if request.dropout else None
    step = _Step(request, length, tuple(plans), peers, kernel, seed, autocast_of_now(request.query.device))
    given = (request.query, request.key, request.value, request.sinks, request.bias)
    result: Tensor = _InGroups.apply(step, *given, *_learned(request.module))  # type: ignore[no-untyped-call]  # torch has no types for it
    return result


def overlaps(device: torch.device) -> bool:
    """Whether what travels and what computes do not wait for each other, so that the next group may travel early."""
    return device.type != "cpu"


def _learned(module: nn.Module | None) -> list[Tensor]:
    """What a kernel may read of the module by itself, and have gradients for."""
    return [] if module is None else [one for one in module.parameters(recurse=False) if one.requires_grad]


def _heads(tensor: Tensor, heads: range) -> Tensor:
    return tensor[:, :, heads.start : heads.stop]


@dataclass(frozen=True, eq=False)
class _Step:
    """The step of all groups, but for tensors that have gradients.

    seed: of dropout, which draws in backward what it drew before; None without. autocast: what kernels are called in.
    """

    request: Request
    length: int
    plans: tuple[HeadPlan | Grid, ...]
    peers: Peers
    kernel: Kernel
    seed: int | None
    autocast: Callable[[], AbstractContextManager[Any]]

    def groups(self, given: Sequence[Tensor | None]) -> list[Request]:
        """The requests of the groups, with these tensors in place of q, k, v, sinks and bias."""
        query, key, value, sinks, bias = given
        assert query is not None
        assert key is not None
        assert value is not None
        whole = replace(self.request, query=query, key=key, value=value, sinks=sinks, bias=bias)
        return in_groups(whole, len(self.plans))

    def start(self, tensors: Moved, kinds: tuple[Rows, ...], group: int) -> Callable[[], Moved]:
        """Let tensors [B, s, heads, D] of a group travel to the layout of the kernel; the result waits for them."""
        plan, device = self.plans[group], self.request.query.device
        if self.peers.is_alone:
            return lambda: tensors
        if isinstance(plan, Grid):
            return partial(exchange_to_grid, tensors, kinds, self.length, plan, self.peers)
        start = start_to_heads if overlaps(device) else partial(partial, exchange_to_heads)
        return start(tensors, plan, kinds, self.length, self.peers)

    def back(self, tensors: Moved, kinds: tuple[Rows, ...], group: int) -> Moved:
        """[B, s, heads, D] each, of what the kernel returned, or of gradients of what it was given."""
        plan = self.plans[group]
        if self.peers.is_alone:
            return tensors
        if isinstance(plan, Grid):
            return return_from_grid(tensors, kinds, self.length, plan, self.peers)
        return back_to_sequence(tensors, plan, kinds, self.peers)

    def attend(self, one: Request, arrived: Moved, group: int) -> Tensor:
        """What the kernel makes of a group, in its layout."""
        draws: AbstractContextManager[None] = nullcontext()
        if self.seed is not None:
            draws = rng.Forked(rng.derived(self.seed, group), self.request.query.device)
        with draws, self.autocast():
            return attend_arrived(one, arrived, self.length, self.plans[group], self.peers, self.kernel)[0]


class _Arrivals:
    """q, k and v of one group after the other; the next travel, where they may, while what was taken is used."""

    def __init__(self, step: _Step, groups: list[Request]) -> None:
        self._step, self._groups = step, groups
        self._next = self._started(0)

    def take(self, group: int) -> Moved:
        arrived = self._next()
        if group + 1 < len(self._groups):
            self._next = self._started(group + 1)
        return arrived

    def _started(self, group: int) -> Callable[[], Moved]:
        one = self._groups[group]
        return self._step.start((one.query, one.key, one.value), _QKV, group)


class _InGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, *given: Tensor | None) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*given[:5])
        groups = step.groups(given[:5])
        arrivals, query = _Arrivals(step, groups), step.request.query
        whole: Tensor | None = None
        for group, (one, heads) in enumerate(zip(groups, _query_heads(step), strict=True)):
            (out,) = step.back((step.attend(one, arrivals.take(group), group),), ("query",), group)
            if whole is None:
                whole = out.new_empty(*query.shape[:3], out.shape[3])
            _heads(whole, heads).copy_(out)
        assert whole is not None
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step: _Step = ctx.step
        given, asked = ctx.saved_tensors, ctx.needs_input_grad[1:]
        groups = step.groups([None if one is None else one.detach() for one in given])
        # A place for each gradient, of which a group has a part as it has one of what the gradient is of.
        needed = (True, True, True, *asked[3:5])
        totals = [torch.zeros_like(one) if there else None for one, there in zip(given, needed, strict=True)]
        places, arrivals = step.groups(totals), _Arrivals(step, groups)
        of_learned: list[Tensor | None] = [None] * len(asked[5:])
        for group, (one, place, heads) in enumerate(zip(groups, places, _query_heads(step), strict=True)):
            found = _gradients(step, group, one, arrivals.take(group), _heads(grad, heads), asked)
            for total, more in zip((place.query, place.key, place.value, place.sinks, place.bias), found, strict=False):
                if total is not None and more is not None:
                    total.add_(more)
            of_learned = [_sum(*pair) for pair in zip(of_learned, found[5:], strict=True)]
        found = [*totals, *of_learned]
        return None, *(one if wanted else None for one, wanted in zip(found, asked, strict=True))


def _query_heads(step: _Step) -> tuple[range, ...]:
    """Those of each group."""
    request = step.request
    return head_groups(request.query.shape[2], request.key.shape[2], len(step.plans)).query


def _gradients(
    step: _Step, group: int, one: Request, arrived: Moved, grad: Tensor, asked: Sequence[bool]
) -> list[Tensor | None]:
    """Those of a group's q, k, v, sinks and bias, and of what its kernel may read of the module.

    grad: [B, s, heads, Dv], of what the group returned. asked: of which of all these there are to be gradients.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in arrived]
    sinks, bias = (
        tensor.detach().requires_grad_() if wanted and tensor is not None else tensor
        for tensor, wanted in zip((one.sinks, one.bias), asked[3:5], strict=True)
    )
    with torch.enable_grad():
        out = step.attend(replace(one, sinks=sinks, bias=bias), tuple(leaves), group)
    inputs = [*leaves, sinks, bias, *_learned(one.module)]
    wanted = [one is not None and one.requires_grad for one in inputs]
    (at_kernel,) = step.start((grad,), ("query",), group)()
    chosen = [one for one, there in zip(inputs, wanted, strict=True) if there and one is not None]
    grads = iter(torch.autograd.grad(out, chosen, at_kernel, allow_unused=True))
    del out, at_kernel
    found = [next(grads) if there else None for there in wanted]
    given = tuple(torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found[:3], strict=True))
    return [*step.back(given, _QKV, group), *found[3:]]


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more
