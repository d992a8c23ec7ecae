"""The Ulysses core: trade sequence for heads and back, gather, slice; uneven everywhere, with gradients.

Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv 2309.14509), section 3; their N is our S, their P is our P. Unlike
there, neither S nor the heads need be divisible by P, and q, k and v travel in one all-to-all.

Gradients follow one rule: the gradient of a tensor that a rank holds a part of is P times the true one, and the mean
over ranks of the gradient of a tensor that every rank holds whole is the true one. The mean over ranks that data
parallel engines take of parameter gradients then gives the single-process gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sp_attention.distributed.buffer_pool import Memory
from sp_attention.ulysses.buffer_layout import Heads, Kind, Packing, Run, packing
from sp_attention.ulysses.head_plan import HeadPlan, Span, span_of, spans

Result = TypeVar("Result")


@dataclass(eq=False)
class Watch:
    """In a rehearsal, where a step may fail on one rank alone and leave the others waiting for it in a collective.

    While a step is watched, on `device`, the ranks tell each other before every collective that they come to it.
    """

    device: torch.device | None = None


@dataclass(frozen=True)
class Peers:
    """The ranks that share a sequence, seen from one of them; `rank` counts inside the group.

    memory: for what is exchanged.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    watch: Watch = field(default_factory=Watch, compare=False)
    memory: Memory = field(default_factory=Memory, compare=False)

    def meet(self, *what: int) -> None:
        """Called before a collective, with numbers that tell it from others: its kind, and what all ranks know alike.

        Raises RuntimeError in a watched step that another rank has ended, or in which it comes to another collective.
        """
        if self.watch.device is not None and len(set(self._announced(hash(what) | 1))) > 1:
            raise RuntimeError("the ranks part here: another one ended this step, or went on otherwise")

    def watched(self, step: Callable[[], Result], device: torch.device) -> Result:
        """The result of a step that may raise on some ranks only; all ranks return or raise together."""
        self.watch.device = device
        try:
            return step()
        finally:
            # Whoever still comes to a collective is told, and ends up here too.
            while any(self._announced(0)):
                pass
            self.watch.device = None

    def _announced(self, number: int) -> list[int]:
        """What each rank announces: 0 for the end of a step."""
        numbers = torch.empty(self.size, dtype=torch.int64, device=self.watch.device)
        mine = torch.tensor([number], device=self.watch.device)
        dist.all_gather(list(numbers.split(1)), mine, group=self.group)
        return [int(one) for one in numbers.tolist()]

    def span(self, length: int) -> Span:
        """My span of a sequence of `length` tokens."""
        return span_of(self.rank, length, self.size)


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
    result: tuple[Tensor, ...] = _SeqToHead.apply(length, plan, kinds, peers, *tensors)  # type: ignore[no-untyped-call]
    return result


def head_to_seq(out: Tensor, plan: HeadPlan, peers: Peers) -> Tensor:
    """[B, S, h, Dv] → [B, s, H, Dv], contiguous: the inverse of `seq_to_head` for what the kernel returns."""
    if out.shape[2] != len(plan.query[peers.rank]):
        raise ValueError(f"an output {list(out.shape)} does not hold this rank's {len(plan.query[peers.rank])} heads")
    result: Tensor = _HeadToSeq.apply(out, plan, peers)  # type: ignore[no-untyped-call]
    return result


def gather(part: Tensor, length: int, peers: Peers, dim: int = 1) -> Tensor:
    """My span along `dim` → the whole tensor of `length` along `dim`, on every rank. Bit-equal on all ranks."""
    result: Tensor = _Gather.apply(part, length, peers, dim)  # type: ignore[no-untyped-call]
    return result


def sum_over_ranks(part: Tensor, peers: Peers) -> Tensor:
    """The sum of each rank's `part`, the same bits on every rank."""
    result: Tensor = _SumOverRanks.apply(part, peers)  # type: ignore[no-untyped-call]
    return result


def mean_over_ranks(whole: Tensor, peers: Peers) -> Tensor:
    """The mean of what each rank has of a tensor, such as a gradient; without a gradient of its own."""
    return sum_over_ranks(whole.detach(), peers) / peers.size


# torch has no types for `Function.apply`, hence the ignores above.
class _SeqToHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, length: int, plan: HeadPlan, kinds: tuple[Kind, ...], peers: Peers, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.kinds, ctx.peers = plan, kinds, peers
        return _to_heads(tensors, plan, kinds, length, peers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *_to_sequence(grads, ctx.plan, ctx.kinds, ctx.peers)


class _HeadToSeq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, plan: HeadPlan, peers: Peers) -> Tensor:
        ctx.plan, ctx.peers, ctx.length = plan, peers, out.shape[1]
        return _to_sequence((out,), plan, ("query",), peers)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_to_heads((grad,), ctx.plan, ("query",), ctx.length, ctx.peers), None, None)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, length: int, peers: Peers, dim: int) -> Tensor:
        ctx.peers, ctx.dim = peers, dim
        cut = spans(length, peers.size)
        rows = part.movedim(dim, 0)
        # All spans travel at the length of the longest, since all-gather wants equal shapes.
        padded = rows.new_zeros(len(cut[0]), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        received = [torch.empty_like(padded) for _ in cut]
        peers.meet(2, length, *padded.shape)
        dist.all_gather(received, padded, group=peers.group)
        whole = torch.cat([piece[: len(span)] for piece, span in zip(received, cut, strict=True)])
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
        sizes = [len(span) for span in cut]
        peers.meet(3, *rows.shape)
        dist.all_to_all_single(received, rows, [mine] * peers.size, sizes, group=peers.group)
        return received.unflatten(0, (peers.size, mine)).sum(0).movedim(0, ctx.dim), None, None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, peers: Peers) -> Tensor:
        ctx.size = peers.size
        total = part.clone()
        peers.meet(4, *total.shape)
        dist.all_reduce(total, group=peers.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank holds the same sum, hence the same gradient: their sum needs no collective.
        return grad * ctx.size, None


def _to_heads(
    tensors: Sequence[Tensor], plan: HeadPlan, kinds: tuple[Kind, ...], length: int, peers: Peers
) -> tuple[Tensor, ...]:
    """[B, s, H, D] each → [B, S, h, D] each, in one all-to-all.

    Token-major rows with all of a rank's heads side by side: what arrives is one [S, B, width] buffer in order, of
    which the results are views, so nothing is unpacked.
    """
    batch, sizes = tensors[0].shape[0], tuple(tensor.shape[3] for tensor in tensors)
    pack = _packing(plan, kinds, sizes, batch, length, peers.rank)
    whole = peers.memory.empty((length, batch, pack.width), tensors[0])
    send = peers.memory.empty((pack.travelling,), tensors[0])
    for run, rows in _runs(send, batch, pack):
        rows = _rows(whole, pack.mine)[None] if rows is None else rows
        for tensor, heads, column in zip(tensors, run.heads, _columns(rows, run.each, sizes), strict=True):
            column.copy_(_heads_of(tensor, heads, run.ranks))
    peers.meet(5, length, batch, pack.all_widths)
    dist.all_to_all_single(_rows(whole, pack.sent).view(-1), send, pack.by_tokens, pack.by_heads, group=peers.group)
    return tuple(column[0] for column in _columns(whole[None], pack.heads, sizes))


def _to_sequence(
    tensors: Sequence[Tensor], plan: HeadPlan, kinds: tuple[Kind, ...], peers: Peers
) -> tuple[Tensor, ...]:
    """[B, S, h, D] each → [B, s, H, D] each, in one all-to-all; heads that several ranks hold are added up."""
    batch, length = tensors[0].shape[:2]
    sizes = tuple(tensor.shape[3] for tensor in tensors)
    pack = _packing(plan, kinds, sizes, batch, length, peers.rank)
    rows = [tensor.transpose(0, 1).flatten(2) for tensor in tensors]
    send = _rows(rows[0], pack.sent)
    if len(rows) > 1 or not send.is_contiguous():
        send = peers.memory.empty((len(pack.sent), batch, pack.width), tensors[0])
        torch.cat([_rows(row, pack.sent) for row in rows], 2, out=send)
    received = peers.memory.empty((pack.travelling,), tensors[0])
    peers.meet(6, length, batch, pack.all_widths)
    dist.all_to_all_single(received, send.view(-1), pack.by_heads, pack.by_tokens, group=peers.group)
    results = tuple(
        peers.memory.empty((batch, len(pack.mine), getattr(plan, kind)[-1].stop, size), tensors[0])
        for kind, size in zip(kinds, sizes, strict=True)
    )
    for result, shares in zip(results, pack.shares, strict=True):
        if shares:
            result.zero_()
    # What has not travelled is where it was.
    own = tuple(tensor[None, :, pack.mine.start : pack.mine.stop] for tensor in tensors)
    for run, some in _runs(received, batch, pack):
        columns = own if some is None else _columns(some, run.each, sizes)
        for result, heads, shares, column in zip(results, run.heads, pack.shares, columns, strict=True):
            if heads.same:
                _heads_of(result, heads, 1).add_(column.sum(0, keepdim=True))
            elif shares:
                _heads_of(result, heads, run.ranks).add_(column)
            else:
                _heads_of(result, heads, run.ranks).copy_(column)
    return results


def _packing(*shape: Any) -> Packing:
    # A compiler follows it, and keeps what comes of it in the graph.
    return packing.__wrapped__(*shape) if torch.compiler.is_compiling() else packing(*shape)


def _rows(tensor: Tensor, span: Span) -> Tensor:
    return tensor[span.start : span.stop]


def _runs(travelling: Tensor, batch: int, pack: Packing) -> Iterator[tuple[Run, Tensor | None]]:
    """Each run with its rows [ranks, s, B, width] of what travels, None for this rank's own, which does not."""
    start, mine = 0, len(pack.mine)
    for run in pack.runs:
        if run.is_own:
            yield run, None
            continue
        stop = start + run.ranks * mine * batch * run.width
        yield run, travelling[start:stop].view(run.ranks, mine, batch, run.width)
        start = stop


def _columns(rows: Tensor, heads: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Views [n, B, s, heads, D] of rows [n, s, B, width]: of each tensor so many heads of n ranks, of this size."""
    shapes = list(zip(heads, sizes, strict=True))
    parts = rows.split([count * size for count, size in shapes], 3)
    return tuple(part.unflatten(3, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True))


def _heads_of(tensor: Tensor, heads: Heads, ranks: int) -> Tensor:
    """A view [n, B, s, heads, D] of a tensor [B, s, H, D]: the heads that n ranks have."""
    if heads.same:
        return tensor[:, :, heads.start : heads.start + heads.each].expand(ranks, -1, -1, -1, -1)
    several = tensor[:, :, heads.start : heads.start + ranks * heads.each]
    view: Tensor = several.unflatten(2, (ranks, heads.each)).movedim(2, 0)
    return view
