"""The Ulysses exchange: trade sequence for heads and back; uneven everywhere, with gradients.

Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509), section 3; their N is our S, their P is our P. Unlike
there, neither S nor the heads need be divisible by P, and q, k and v travel in one all-to-all.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sp_attention.distributed.once_differentiable import once_differentiable
from sp_attention.distributed.peers import Peers
from sp_attention.ulysses.buffer_layout import BufferLayout, HeadSlice, Kind, RankRange, buffer_layout
from sp_attention.ulysses.head_plan import HeadPlan


def seq_to_head(
    query: Tensor, key: Tensor, value: Tensor, length: int, plan: HeadPlan, peers: Peers
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, s, H, D], [B, s, Hkv, D], [B, s, Hkv, Dv] → [B, S, h, D], [B, S, hkv, D], [B, S, hkv, Dv].

    One float dtype for all three, kept. `length` is S. The results are strided views of one buffer. One collective,
    whose gradient is one collective; the gradient of a KV head that several ranks hold is the sum of theirs.
    Raises ValueError, before anything is sent, when shapes, length and plan disagree.
    """
    arrived = to_heads((query, key, value), plan, ("query", "kv", "kv"), length, peers)
    return arrived[0], arrived[1], arrived[2]


def to_heads(
    tensors: tuple[Tensor, ...], plan: HeadPlan, kinds: tuple[Kind, ...], length: int, peers: Peers
) -> tuple[Tensor, ...]:
    """[B, s, H, D] each → [B, S, h, D] each: `seq_to_head` for any tensors, of these kinds of the plan's heads."""
    mine = len(peers.span(length))
    for tensor, kind in zip(tensors, kinds, strict=True):
        heads = getattr(plan, kind)[-1].stop
        if tensor.shape[1:3] != (mine, heads) or tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"a tensor {tensor.dtype} {list(tensor.shape)} does not fit {mine} of {length} tokens, "
                f"{heads} heads and {tensors[0].dtype}"
            )
    if peers.is_alone:
        return tensors
    result: tuple[Tensor, ...] = _SeqToHead.apply(length, plan, kinds, peers, *tensors)  # type: ignore[no-untyped-call]
    return result


def head_to_seq(out: Tensor, plan: HeadPlan, peers: Peers) -> Tensor:
    """[B, S, h, Dv] → [B, s, H, Dv], contiguous: the inverse of `seq_to_head` for what the kernel returns."""
    if out.shape[2] != len(plan.query[peers.rank]):
        raise ValueError(f"an output {list(out.shape)} does not hold this rank's {len(plan.query[peers.rank])} heads")
    if peers.is_alone:
        return out.contiguous()
    result: Tensor = _HeadToSeq.apply(out, plan, peers)  # type: ignore[no-untyped-call]
    return result


# torch has no types for `Function.apply`, hence the ignores above.
class _SeqToHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, length: int, plan: HeadPlan, kinds: tuple[Kind, ...], peers: Peers, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.kinds, ctx.peers = plan, kinds, peers
        return exchange_to_heads(tensors, plan, kinds, length, peers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *back_to_sequence(grads, ctx.plan, ctx.kinds, ctx.peers)


class _HeadToSeq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, plan: HeadPlan, peers: Peers) -> Tensor:
        ctx.plan, ctx.peers, ctx.length = plan, peers, out.shape[1]
        return back_to_sequence((out,), plan, ("query",), peers)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*exchange_to_heads((grad,), ctx.plan, ("query",), ctx.length, ctx.peers), None, None)


def exchange_to_heads(
    tensors: Sequence[Tensor], plan: HeadPlan, kinds: tuple[Kind, ...], length: int, peers: Peers
) -> tuple[Tensor, ...]:
    """[B, s, H, D] each → [B, S, h, D] each, in one all-to-all, without gradients.

    Token-major rows with all of a rank's heads side by side: what arrives is one [S, B, width] buffer in order, of
    which the results are views, so nothing is unpacked.
    """
    layout, whole, send, sizes = _packed(tensors, plan, kinds, length, peers)
    peers.all_to_all(_rows(whole, layout.sent).view(-1), send, layout.by_tokens, layout.by_heads)
    return _unpacked(layout, whole, sizes)


def start_to_heads(
    tensors: Sequence[Tensor], plan: HeadPlan, kinds: tuple[Kind, ...], length: int, peers: Peers
) -> Callable[[], tuple[Tensor, ...]]:
    """`to_heads` under way, without gradients: what is returned waits for the results."""
    layout, whole, send, sizes = _packed(tensors, plan, kinds, length, peers)
    place = _rows(whole, layout.sent).view(-1)
    wait = peers.start_all_to_all(place, send, layout.by_tokens, layout.by_heads)

    def arrived() -> tuple[Tensor, ...]:
        wait()
        return _unpacked(layout, whole, sizes)

    return arrived


def _packed(
    tensors: Sequence[Tensor], plan: HeadPlan, kinds: tuple[Kind, ...], length: int, peers: Peers
) -> tuple[BufferLayout, Tensor, Tensor, tuple[int, ...]]:
    """The layout, the buffer for what arrives, with this rank's own part in it, what travels, and head sizes."""
    batch, sizes = tensors[0].shape[0], tuple(tensor.shape[3] for tensor in tensors)
    layout = _layout(plan, kinds, sizes, batch, length, peers.rank)
    whole = peers.pool.empty((length, batch, layout.width), tensors[0])
    send = peers.pool.empty((layout.travelling,), tensors[0])
    for ranks, rows in _rank_ranges(send, batch, layout):
        rows = _rows(whole, layout.mine)[None] if rows is None else rows
        for tensor, heads, column in zip(tensors, ranks.heads, _columns(rows, ranks.each, sizes), strict=True):
            column.copy_(_heads_of(tensor, heads, ranks.ranks))
    peers.meet(5, length, batch, layout.all_widths)
    return layout, whole, send, sizes


def _unpacked(layout: BufferLayout, whole: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(column[0] for column in _columns(whole[None], layout.heads, sizes))


def back_to_sequence(
    tensors: Sequence[Tensor], plan: HeadPlan, kinds: tuple[Kind, ...], peers: Peers
) -> tuple[Tensor, ...]:
    """[B, S, h, D] each → [B, s, H, D] each, in one all-to-all; heads that several ranks hold are added up.

    Without gradients.
    """
    batch, length = tensors[0].shape[:2]
    sizes = tuple(tensor.shape[3] for tensor in tensors)
    layout = _layout(plan, kinds, sizes, batch, length, peers.rank)
    rows = [tensor.transpose(0, 1).flatten(2) for tensor in tensors]
    send = _rows(rows[0], layout.sent)
    if len(rows) > 1 or not send.is_contiguous():
        send = peers.pool.empty((len(layout.sent), batch, layout.width), tensors[0])
        torch.cat([_rows(row, layout.sent) for row in rows], 2, out=send)
    received = peers.pool.empty((layout.travelling,), tensors[0])
    peers.meet(6, length, batch, layout.all_widths)
    peers.all_to_all(received, send.view(-1), layout.by_heads, layout.by_tokens)
    results = tuple(
        peers.pool.empty((batch, len(layout.mine), getattr(plan, kind)[-1].stop, size), tensors[0])
        for kind, size in zip(kinds, sizes, strict=True)
    )
    for result, shares in zip(results, layout.shares, strict=True):
        if shares:
            result.zero_()
    # What has not travelled is where it was.
    own = tuple(tensor[None, :, layout.mine.start : layout.mine.stop] for tensor in tensors)
    for ranks, some in _rank_ranges(received, batch, layout):
        columns = own if some is None else _columns(some, ranks.each, sizes)
        for result, heads, shares, column in zip(results, ranks.heads, layout.shares, columns, strict=True):
            if heads.same:
                _heads_of(result, heads, 1).add_(column.sum(0, keepdim=True))
            elif shares:
                _heads_of(result, heads, ranks.ranks).add_(column)
            else:
                _heads_of(result, heads, ranks.ranks).copy_(column)
    return results


def _layout(*shape: Any) -> BufferLayout:
    # A compiler follows it, and keeps what comes of it in the graph.
    return buffer_layout.__wrapped__(*shape) if torch.compiler.is_compiling() else buffer_layout(*shape)


def _rows(tensor: Tensor, span: range) -> Tensor:
    return tensor[span.start : span.stop]


def _rank_ranges(travelling: Tensor, batch: int, layout: BufferLayout) -> Iterator[tuple[RankRange, Tensor | None]]:
    """Each ranks with its rows [ranks, s, B, width] of what travels, None for this rank's own, which does not."""
    start, mine = 0, len(layout.mine)
    for ranks in layout.ranges:
        if ranks.is_own:
            yield ranks, None
            continue
        stop = start + ranks.ranks * mine * batch * ranks.width
        yield ranks, travelling[start:stop].view(ranks.ranks, mine, batch, ranks.width)
        start = stop


def _columns(rows: Tensor, heads: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views [n, B, s, heads, D] of rows [n, s, B, width]: of each tensor so many heads of n ranks, of this size."""
    shapes = list(zip(heads, sizes, strict=True))
    parts = rows.split([count * size for count, size in shapes], 3)
    return tuple(part.unflatten(3, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True))


def _heads_of(tensor: Tensor, heads: HeadSlice, ranks: int) -> Tensor:
    """A view [n, B, s, heads, D] of a tensor [B, s, H, D]: the heads that n ranks have."""
    if heads.same:
        return tensor[:, :, heads.start : heads.start + heads.each].expand(ranks, -1, -1, -1, -1)
    several = tensor[:, :, heads.start : heads.start + ranks * heads.each]
    view: Tensor = several.unflatten(2, (ranks, heads.each)).movedim(2, 0)
    return view
