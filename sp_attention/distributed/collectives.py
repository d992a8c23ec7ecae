"""Gather spans and sum over ranks, with gradients: what is computed from the result is computed on every rank alike.

Gradients follow one rule: the gradient of a tensor that a rank holds a part of is P times the true one, and the mean
over ranks of the gradient of a tensor that every rank holds whole is the true one. The mean over ranks that data
parallel engines take of parameter gradients then gives the single-process gradient.
"""

from typing import Any

import torch
from torch import Tensor

from sp_attention.distributed.once_differentiable import once_differentiable
from sp_attention.distributed.partition import spans
from sp_attention.distributed.peers import Peers


def gather(span: Tensor, length: int, peers: Peers, dim: int = 1) -> Tensor:
    """My span along `dim` → the whole tensor of `length` along `dim`, on every rank. Bit-equal on all ranks."""
    if peers.is_alone:
        return span
    result: Tensor = _Gather.apply(span, length, peers, dim)  # type: ignore[no-untyped-call]
    return result


def sum_over_ranks(part: Tensor, peers: Peers) -> Tensor:
    """The sum of each rank's `part`, the same bits on every rank."""
    result: Tensor = _SumOverRanks.apply(part, peers)  # type: ignore[no-untyped-call]
    return result


def mean_over_ranks(whole: Tensor, peers: Peers) -> Tensor:
    """The mean of what each rank has of a tensor, such as a gradient; without a gradient of its own."""
    return sum_over_ranks(whole.detach(), peers) / peers.size


# torch has no types for `Function.apply`, hence the ignores above.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, span: Tensor, length: int, peers: Peers, dim: int) -> Tensor:
        ctx.peers, ctx.dim = peers, dim
        cut = spans(length, peers.size)
        rows = span.movedim(dim, 0)
        # All spans travel at the length of the longest, since all-gather wants equal shapes.
        padded = rows.new_zeros(len(cut[0]), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        peers.meet(2, length, *padded.shape)
        received = peers.all_gather(padded)
        whole = torch.cat([rows[: len(tokens)] for rows, tokens in zip(received, cut, strict=True)])
        # Contiguous as the tensor of one process is, which some code takes for granted.
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A reduce-scatter of uneven spans: each rank gets its span of every rank's gradient and adds them up.
        peers, rows = ctx.peers, grad.movedim(ctx.dim, 0).contiguous()
        cut = spans(rows.shape[0], peers.size)
        mine = len(cut[peers.rank])
        received = rows.new_empty(peers.size * mine, *rows.shape[1:])
        sizes = [len(tokens) for tokens in cut]
        peers.meet(3, *rows.shape)
        peers.all_to_all(received, rows, [mine] * peers.size, sizes)
        return received.unflatten(0, (peers.size, mine)).sum(0).movedim(0, ctx.dim), None, None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, peers: Peers) -> Tensor:
        ctx.size = peers.size
        total = part.clone()
        peers.meet(4, *total.shape)
        peers.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank holds the same sum, hence the same gradient: their sum needs no collective.
        return grad * ctx.size, None
