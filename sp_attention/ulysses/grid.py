"""More ranks than heads: a grid of head groups × query blocks, in the same two collectives.

P = P_h × P_q. A rank computes the heads of one group for the queries of one block, over all keys. So the exchange sends
it those rows of q, and all rows of k and v of its heads, which the P_q ranks of a group have alike; the way back sends
rows to the ranks that hold them. Of 2 · P_q neighbouring chunks of the sequence a block is one from the front and one
from the back, j and 2 · P_q - 1 - j, so that causal blocks are equal work (Brandon et al. 2023, "Striped Attention",
arXiv 2311.09431, has the problem; pairs of chunks are those of context parallelism in Llama 3, arXiv 2407.21783,
section 3.3.2). Tokens stay where they are: only attention sees blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from sp_attention.distributed.once_differentiable import once_differentiable
from sp_attention.distributed.partition import span_of
from sp_attention.distributed.peers import Peers
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

# Of a tensor either the queries' rows of a block, or all rows of the sequence; heads of a group in both.
Rows = Literal["query", "kv"]


@dataclass(frozen=True, eq=False)
class Grid:
    """Which heads and which queries each rank computes: heads.query[group_of(rank)] for chunks(length, rank).

    heads: the plan of the head groups, in place of ranks. blocks: P_q. Neighbouring ranks are of different groups and
    of one block, since they trade queries, while groups trade with each other through the keys that they share.
    """

    heads: HeadPlan
    blocks: int

    @property
    def groups(self) -> int:
        """P_h."""
        return len(self.heads.query)

    @property
    def ranks(self) -> int:
        """P."""
        return self.groups * self.blocks

    def group_of(self, rank: int) -> int:
        return rank % self.groups

    def kinds_of_chunks(self, length: int) -> list[range]:
        """Chunks as kernels are given them: of each length the first, and one that is later in the sequence."""
        chunks = [span_of(chunk, length, 2 * self.blocks) for chunk in range(2 * self.blocks)]
        found = {(len(chunk), chunk.start > 0): chunk for chunk in reversed(chunks) if chunk}
        return [*found.values()]

    def chunks(self, length: int, rank: int) -> tuple[range, range]:
        """The queries of a rank, in order, of a sequence of `length` tokens: two chunks of it, the last maybe empty."""
        block, chunks = rank // self.groups, 2 * self.blocks
        return span_of(block, length, chunks), span_of(chunks - 1 - block, length, chunks)


@cache
def grid_of(query_heads: int, kv_heads: int, ranks: int) -> Grid | None:
    """The grid in which the busiest rank has least to compute, of most head groups; None where no rank lacks heads."""
    if ranks <= query_heads:
        return None
    divisors = [groups for groups in range(1, query_heads + 1) if ranks % groups == 0]
    # A rank has up to ⌈heads / groups⌉ heads, of one in ranks / groups queries.
    groups = min(divisors, key=lambda groups: (-(-query_heads // groups) * groups, -groups))
    return Grid(head_plan(query_heads, kv_heads, groups), ranks // groups)


def to_grid(
    query: Tensor, key: Tensor, value: Tensor, length: int, grid: Grid, peers: Peers
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, s, H, D], [B, s, Hkv, D], [B, s, Hkv, Dv] → [B, Sq, h, D], [B, S, hkv, D], [B, S, hkv, Dv].

    One dtype for all three. Sq are my chunks' queries, one behind the other. One collective, and one in backward, where
    gradients of keys and values are summed over the ranks that had them.
    """
    result: tuple[Tensor, Tensor, Tensor] = _ToGrid.apply(length, grid, peers, query, key, value)  # type: ignore[no-untyped-call]
    return result


def from_grid(out: Tensor, length: int, grid: Grid, peers: Peers) -> Tensor:
    """[B, Sq, h, Dv] → [B, s, H, Dv]: the inverse of `to_grid` for what the kernel returns."""
    result: Tensor = _FromGrid.apply(out, length, grid, peers)  # type: ignore[no-untyped-call]
    return result


# torch has no types for `Function.apply`, hence the ignores above.
class _ToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, length: int, grid: Grid, peers: Peers, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.length, ctx.grid, ctx.peers = length, grid, peers
        return exchange_to_grid(tensors, ("query", "kv", "kv"), length, grid, peers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *return_from_grid(grads, ("query", "kv", "kv"), ctx.length, ctx.grid, ctx.peers)


class _FromGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, length: int, grid: Grid, peers: Peers) -> Tensor:
        ctx.length, ctx.grid, ctx.peers = length, grid, peers
        return return_from_grid((out,), ("query",), length, grid, peers)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchange_to_grid((grad,), ("query",), ctx.length, ctx.grid, ctx.peers)[0], None, None, None


@dataclass(frozen=True)
class _Piece:
    """Rows of heads of one tensor that go from the rank that holds them to one that computes with them.

    tensor: which of the tensors. heads: of all heads. held, computed: where the rows are in the tensors of either.
    """

    tensor: int
    heads: range
    held: range
    computed: range

    def numbers(self, batch: int, sizes: Sequence[int]) -> int:
        return batch * len(self.held) * len(self.heads) * sizes[self.tensor]

    def in_held(self, tensors: Sequence[Tensor]) -> Tensor:
        """[B, rows, heads, D]: a view."""
        rows = tensors[self.tensor][:, self.held.start : self.held.stop]
        return rows[:, :, self.heads.start : self.heads.stop]

    def in_computed(self, tensors: Sequence[Tensor]) -> Tensor:
        """[B, rows, heads, D]: a view."""
        return tensors[self.tensor][:, self.computed.start : self.computed.stop]


# By rank, what one of two ranks has for the other.
_Pieces = tuple[tuple[_Piece, ...], ...]


@lru_cache(maxsize=1024)
def _pieces(kinds: tuple[Rows, ...], length: int, grid: Grid, me: int) -> tuple[_Pieces, _Pieces]:
    """What I hold and each rank computes with, and what I compute with and each rank holds."""
    ranks = range(grid.ranks)
    held = tuple(_between(kinds, length, grid, me, rank) for rank in ranks)
    return held, tuple(_between(kinds, length, grid, rank, me) for rank in ranks)


def _between(kinds: tuple[Rows, ...], length: int, grid: Grid, holder: int, computer: int) -> tuple[_Piece, ...]:
    span = span_of(holder, length, grid.ranks)
    first, last = grid.chunks(length, computer)
    found = []
    for tensor, kind in enumerate(kinds):
        heads = getattr(grid.heads, kind)[grid.group_of(computer)]
        # Chunks, and where their rows begin in the computer's tensor.
        places = ((first, 0), (last, len(first))) if kind == "query" else ((range(length), 0),)
        for chunk, begin in places:
            rows = range(max(span.start, chunk.start), min(span.stop, chunk.stop))
            if rows:
                held, computed = rows.start - span.start, begin + rows.start - chunk.start
                there = range(computed, computed + len(rows))
                found.append(_Piece(tensor, heads, range(held, held + len(rows)), there))
    return tuple(found)


def exchange_to_grid(
    tensors: Sequence[Tensor], kinds: tuple[Rows, ...], length: int, grid: Grid, peers: Peers
) -> tuple[Tensor, ...]:
    """[B, s, H, D] each → [B, Sq, h, D] of queries, [B, S, hkv, D] of keys and values, in one all-to-all.

    Without gradients.
    """
    sent, arriving = _pieces(kinds, length, grid, peers.rank)
    send = [piece.in_held(tensors) for pieces in sent for piece in pieces]
    received = _all_to_all(tensors, send, (sent, arriving), length, peers)
    rows = {"query": sum(map(len, grid.chunks(length, peers.rank))), "kv": length}
    mine = grid.group_of(peers.rank)
    results = tuple(
        tensor.new_empty(len(tensor), rows[kind], len(getattr(grid.heads, kind)[mine]), tensor.shape[3])
        for tensor, kind in zip(tensors, kinds, strict=True)
    )
    for piece, numbers in received:
        place = piece.in_computed(results)
        place.copy_(numbers.view_as(place))
    return results


def return_from_grid(
    tensors: Sequence[Tensor], kinds: tuple[Rows, ...], length: int, grid: Grid, peers: Peers
) -> tuple[Tensor, ...]:
    """The reverse of `exchange_to_grid`, in one all-to-all; rows and heads that several ranks have are added up."""
    arriving, sent = _pieces(kinds, length, grid, peers.rank)
    send = [piece.in_computed(tensors) for pieces in sent for piece in pieces]
    received = _all_to_all(tensors, send, (sent, arriving), length, peers)
    results = tuple(
        tensor.new_zeros(len(tensor), len(peers.span(length)), getattr(grid.heads, kind)[-1].stop, tensor.shape[3])
        for tensor, kind in zip(tensors, kinds, strict=True)
    )
    for piece, numbers in received:
        place = piece.in_held(results)
        place.add_(numbers.view_as(place))
    return results


def _all_to_all(
    tensors: Sequence[Tensor], parts: list[Tensor], plan: tuple[_Pieces, _Pieces], length: int, peers: Peers
) -> Iterator[tuple[_Piece, Tensor]]:
    """Send parts, in the order of the pieces of `plan[0]`; the pieces of `plan[1]` with the numbers that arrive."""
    like, sizes = tensors[0], [tensor.shape[3] for tensor in tensors]
    batch = like.shape[0]
    out, into = ([sum(piece.numbers(batch, sizes) for piece in some) for some in pieces] for pieces in plan)
    send = torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)
    received = like.new_empty(sum(into))
    peers.meet(9, length, batch, *sizes)
    peers.all_to_all(received, send, into, out)
    flat = [piece for some in plan[1] for piece in some]
    return zip(flat, received.split([piece.numbers(batch, sizes) for piece in flat]), strict=True)
