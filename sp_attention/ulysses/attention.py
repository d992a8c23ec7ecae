"""One attention under Ulysses sequence parallelism, on plain tensors: exchange, any kernel, exchange back.

B batch · S tokens of the sequence, s of them my span · H query heads, h of them mine · Hkv key/value heads, hkv mine ·
D head size, Dv of values. Jacobs et al. 2023 (arXiv 2309.14509), section 3; their N is our S, their P our group's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sp_attention.distributed.collectives import gather
from sp_attention.distributed.peers import Peers
from sp_attention.errors import BackendError
from sp_attention.kernels.registry import usable
from sp_attention.kernels.request import Backend, Request, reason_against
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head, to_heads
from sp_attention.ulysses.grid import Grid, from_grid, grid_of, to_grid
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

# What a kernel gives, and its weights [B, H, Sq, Sk] where they were asked for.
Output = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Kernel:
    """A backend's kernel; `with_weights`: its attention weights are wanted too, of all heads on every rank."""

    backend: Backend
    with_weights: bool = False

    def __call__(self, request: Request) -> Output:
        if self.with_weights:
            assert self.backend.attend_with_weights is not None
            out, weights = self.backend.attend_with_weights(request)
        else:
            out, weights = self.backend.attend(request), None
        if torch.is_grad_enabled() and not out.requires_grad:
            # As zeros are for queries that see nothing, of which this rank may have no others.
            out = _leading_to(out, request.query, request.sinks, request.bias)
        return out, weights

    def why_not(self, request: Request) -> str | None:
        """Why it cannot do this exactly, None if it can."""
        if self.with_weights and self.backend.attend_with_weights is None:
            return "it has no attention weights to return (output_attentions=True)"
        return reason_against(self.backend, request)


def plan_of(request: Request, ranks: int, kernel: Kernel) -> HeadPlan | Grid:
    """How the ranks share self-attention: by heads, and where they outnumber them by queries too.

    By heads alone if attention weights are wanted, or the kernel does not do queries that are later in the sequence.
    """
    counts = request.query.shape[2], request.key.shape[2], ranks
    grid = None if kernel.with_weights else grid_of(*counts)
    if grid is None or any(map(kernel.why_not, requests_of_all_ranks(request, grid))):
        return head_plan(*counts)
    return grid


def attend(request: Request, length: int, plan: HeadPlan | Grid, peers: Peers, kernel: Kernel) -> Output:
    """Self-attention of a sequence of `length` S tokens, of which each rank has a span: the Ulysses step.

    The request has query [B, s, H, D], key [B, s, Hkv, D] and value [B, s, Hkv, Dv] of my span, and all else (mask,
    bias, sinks) of the whole sequence and of all heads. Returns [B, s, H, Dv], and weights [B, H, S, S] or None.
    Two collectives, and two in backward.
    """
    tensors = request.query, request.key, request.value
    if isinstance(plan, Grid):
        # [B, s, H, D], [B, s, Hkv, D], [B, s, Hkv, Dv] → [B, Sq, h, D], [B, S, hkv, D], [B, S, hkv, Dv]
        arrived = to_grid(*tensors, length, plan, peers)
        # → [B, Sq, h, Dv] → [B, s, H, Dv]
        out, weights = attend_arrived(request, arrived, length, plan, peers, kernel)
        return from_grid(out, length, plan, peers), weights
    # [B, s, H, D], [B, s, Hkv, D], [B, s, Hkv, Dv] → [B, S, h, D], [B, S, hkv, D], [B, S, hkv, Dv]
    arrived = seq_to_head(*tensors, length, plan, peers)
    # → [B, S, h, Dv] → [B, s, H, Dv]
    out, weights = attend_arrived(request, arrived, length, plan, peers, kernel)
    return head_to_seq(out, plan, peers), weights


def attend_arrived(
    request: Request, arrived: tuple[Tensor, ...], length: int, plan: HeadPlan | Grid, peers: Peers, kernel: Kernel
) -> Output:
    """The attention of what an exchange has brought of q, k and v, in their layout; the request has all else.

    arrived: [B, S | Sq, h, D], [B, S, hkv, D], [B, S, hkv, Dv]. Returns [B, S | Sq, h, Dv], and weights or None.
    """
    query, key, value = arrived
    if isinstance(plan, HeadPlan):
        mine = replace(cut_to_heads(request, plan, peers.rank), query=query, key=key, value=value)
        return attend_my_heads(mine, plan, peers, kernel)
    group, chunks = plan.group_of(peers.rank), plan.chunks(length, peers.rank)
    mine = replace(cut_to_heads(request, plan.heads, group), key=key, value=value)
    outputs = [
        _attend_group(replace(cut_to_queries(mine, chunk), query=part), plan.heads, group, kernel)[0]
        for chunk, part in zip(chunks, query.split([*map(len, chunks)], 1), strict=True)
    ]
    return torch.cat(outputs, 1), None


def attend_cached(request: Request, length: int | None, plan: HeadPlan, peers: Peers, kernel: Kernel) -> Output:
    """Attention of new tokens to a cache, of whose keys and values each rank holds those of its heads, [B, Sk, hkv, D].

    length: S, where each rank has a span [B, s, H, D] of the queries, and gets [B, s, H, Dv]; None where every rank
    has all of them, and gets all of [B, S, H, Dv].
    """
    mine = cut_to_heads(request, plan, peers.rank)
    if length is None:
        heads = plan.query[peers.rank]
        out, weights = attend_my_heads(
            replace(mine, query=request.query[:, :, heads.start : heads.stop]), plan, peers, kernel
        )
        return gather(out, plan.query[-1].stop, peers, 2), weights
    (query,) = to_heads((request.query,), plan, ("query",), length, peers)
    out, weights = attend_my_heads(replace(mine, query=query), plan, peers, kernel)
    return head_to_seq(out, plan, peers), weights


def attend_to_whole_keys(request: Request, length: int, peers: Peers, kernel: Kernel) -> Output:
    """Attention of my span's queries [B, s, H, D], of S = `length`, to keys that every rank holds, [B, Sk, Hkv, D].

    So it is in cross-attention. Nothing is exchanged. Returns [B, s, H, Dv], and weights [B, H, S, Sk] or None.
    """
    out, weights = kernel(cut_to_queries(request, peers.span(length)))
    return out, None if weights is None else gather(weights, length, peers, 2)


def attend_my_heads(request: Request, plan: HeadPlan, peers: Peers, kernel: Kernel) -> Output:
    """The attention of my heads, [B, S, h, Dv], which may be none: more ranks than heads. The weights are of all."""
    out, weights = _attend_group(request, plan, peers.rank, kernel)
    if not kernel.with_weights or weights is None:
        return out, None
    return out, gather(weights, plan.query[-1].stop, peers, 1)


def _attend_group(request: Request, plan: HeadPlan, group: int, kernel: Kernel) -> Output:
    """The attention of the heads `plan.query[group]`, and their weights; there may be no heads, or no queries."""
    query, key, value = request.query, request.key, request.value
    is_empty = not query.shape[1] or not query.shape[2]
    if is_empty or not plan.grouped[group]:
        order = request.mask.once(
            ("kv of query", plan, group),
            lambda: torch.tensor(plan.kv_of_query(group), dtype=torch.int64, device=key.device),
        )
        key, value = key.index_select(2, order), value.index_select(2, order)
        request = replace(request, key=key, value=value)
    if not is_empty:
        return kernel(request)
    # Empty too, and it takes part in backward like that of the others.
    weights = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
    out = (weights @ value.transpose(1, 2)).transpose(1, 2)
    # So do sinks and biases, of which engines want a gradient on every rank.
    return _leading_to(out, request.sinks, request.bias), weights


def _leading_to(out: Tensor, *given: Tensor | None) -> Tensor:
    """`out`, with a backward that leads to what was given, with gradients of zero: other ranks wait in its exchange."""
    for tensor in given:
        out = out if tensor is None else out + tensor[:0].sum()
    return out


def cut_to_heads(request: Request, plan: HeadPlan, rank: int) -> Request:
    """The request with what is per head, or read from the module by head, cut to one rank's heads; not q, k and v."""
    heads = plan.query[rank]
    bias = request.bias
    first = 0 if request.heads is None else request.heads.start  # of a group of heads, in all of the module's
    return replace(
        request,
        mask=request.mask.heads(heads),
        sinks=None if request.sinks is None else request.sinks[heads.start : heads.stop],
        bias=bias if bias is None or bias.shape[1] == 1 else bias[:, heads.start : heads.stop],
        heads=range(first + heads.start, first + heads.stop),
        all_heads=request.all_heads or plan.query[-1].stop,
    )


def cut_to_queries(request: Request, span: range) -> Request:
    """The request with mask and bias cut to the queries of a span, whose tensors it has."""
    bias = request.bias
    if bias is not None and bias.shape[2] != 1:
        bias = bias[:, :, span.start : span.stop]
    return replace(request, mask=request.mask.rows(span), bias=bias)


def requests_of_all_ranks(request: Request, plan: HeadPlan | Grid) -> list[Request]:
    """What any rank will ask of its kernel: shapes, dtypes and a dense last dim, without memory or values of their own.

    All ranks look at the requests of all, so that a kernel that refuses one of them is refused by every rank, before
    some wait for the others in the exchange.
    """
    if isinstance(plan, Grid):
        return [
            cut_to_queries(replace(one, query=one.query[:, chunk.start : chunk.stop]), chunk)
            for one in requests_of_all_ranks(request, plan.heads)
            for chunk in plan.kinds_of_chunks(request.mask.query_length)
        ]
    queries, keys = request.mask.query_length, request.mask.key_length

    def shaped(like: Tensor, length: int, heads: int) -> Tensor:
        return like.new_empty(like.shape[3]).expand(like.shape[0], length, heads, -1)

    return [
        replace(
            cut_to_heads(request, plan, rank),
            query=shaped(request.query, queries, h),
            key=shaped(request.key, keys, n),
            value=shaped(request.value, keys, n),
        )
        for h, n, rank in plan.kinds
    ]


def require_done(requests: Sequence[Request], kernel: Kernel, name: str) -> None:
    """Raise BackendError unless the kernel does every one of the requests exactly; `name` is who asks, for the text."""
    for request in requests:
        reason = kernel.why_not(request)
        if reason is not None:
            device = request.query.device.type
            others = [replace(kernel, backend=backend) for backend in usable(device)]
            able = [one.backend.kernel for one in others if not any(map(one.why_not, requests))]
            cure = f'Use enable(model, backend="{able[0]}"). ' if able else ""
            raise BackendError(
                f"{name}: kernel {kernel.backend.kernel!r} on {device} cannot do this: {reason}. {cure}"
                f"Installed kernels that can: {', '.join(able) or 'none'}."
            )
