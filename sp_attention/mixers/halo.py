"""The columns before my span, which a causal convolution over it sees, and the last, from whoever holds them."""

from typing import Any

import torch
from torch import Tensor

from sp_attention.distributed.collectives import sum_over_ranks
from sp_attention.distributed.once_differentiable import once_differentiable
from sp_attention.distributed.partition import spans
from sp_attention.distributed.peers import Peers


def with_columns_before(span: Tensor, columns: int, length: int, peers: Peers) -> Tensor:
    """[B, C, s] of my span of `length` tokens → [B, C, columns + s]: with those before it, zeros before the first.

    One collective, in which neighbours alone send anything, unless spans are shorter than `columns`; one in backward.
    """
    result: Tensor = _WithColumnsBefore.apply(span, columns, length, peers)  # type: ignore[no-untyped-call]
    return result


def last_columns(span: Tensor, columns: int, length: int, peers: Peers) -> Tensor:
    """[B, C, s] of my span of `length` tokens → [B, C, columns], or fewer: the last of all, on every rank."""
    mine, start = peers.span(length), max(0, length - columns)
    last = span.new_zeros(*span.shape[:2], length - start)
    first = min(max(mine.start, start), mine.stop)
    last[:, :, max(0, first - start) : max(0, mine.stop - start)] = span[:, :, first - mine.start :]
    return sum_over_ranks(last, peers)


def columns_sent(length: int, columns: int, ranks: int, sender: int, receiver: int) -> range:
    """The tokens of the sender's span that are among the `columns` tokens before the receiver's."""
    cut = spans(length, ranks)
    if sender >= receiver:
        return range(cut[sender].stop, cut[sender].stop)
    start = cut[receiver].start
    return range(min(max(cut[sender].start, start - columns), cut[sender].stop), cut[sender].stop)


# torch has no types for `Function.apply`, hence the ignore above.
class _WithColumnsBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, span: Tensor, columns: int, length: int, peers: Peers) -> Tensor:
        ctx.columns, ctx.length, ctx.peers = columns, length, peers
        rows = span.movedim(2, 0)
        sent, received = _sent_and_received(columns, length, peers)
        start = peers.span(length).start
        send = torch.cat([rows[one.start - start : one.stop - start] for one in sent])
        before = rows.new_zeros(columns, *rows.shape[1:])
        arrived = before[columns - sum(map(len, received)) :]
        peers.meet(9, columns, length, *rows.shape[1:])
        peers.all_to_all(arrived, send, [*map(len, received)], [*map(len, sent)])
        return torch.cat((before.movedim(0, 2), span), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, peers = ctx.columns, ctx.peers
        sent, received = _sent_and_received(columns, ctx.length, peers)
        start = peers.span(ctx.length).start
        send = grad[:, :, columns - sum(map(len, received)) : columns].movedim(2, 0).contiguous()
        arrived = send.new_empty(sum(map(len, sent)), *send.shape[1:])
        peers.meet(10, columns, ctx.length, *send.shape[1:])
        peers.all_to_all(arrived, send, [*map(len, sent)], [*map(len, received)])
        mine = grad[:, :, columns:].clone()
        for one, part in zip(sent, arrived.split([len(one) for one in sent]), strict=True):
            mine[:, :, one.start - start : one.stop - start] += part.movedim(0, 2)
        return mine, None, None, None


def _sent_and_received(columns: int, length: int, peers: Peers) -> tuple[list[range], list[range]]:
    """What I send to each rank, and what each sends to me."""
    sent = [columns_sent(length, columns, peers.size, peers.rank, other) for other in range(peers.size)]
    return sent, [columns_sent(length, columns, peers.size, other, peers.rank) for other in range(peers.size)]
