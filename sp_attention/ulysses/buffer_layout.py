"""How the heads of several ranks lie in what an all-to-all sends or receives: integers only.

Made once for all layers of a shape, and used by as many copies as there are ranges of ranks
alike, not one for each rank.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from sp_attention.distributed.partition import spans
from sp_attention.ulysses.head_plan import HeadPlan

# More ranks send their own tokens through the all-to-all too: few of many, and equal parts need no sizes.
_FEW = 8

# Which of a plan's heads: a tensor is of query heads, of key/value heads, or of those that are kept in a cache.
Kind = Literal["query", "kv", "stored"]


@dataclass(frozen=True)
class HeadSlice:
    """Heads of some ranks in a tensor of all heads, from `start`: `each` of them has so many, or all have the same."""

    start: int
    each: int
    same: bool


@dataclass(frozen=True)
class RankRange:
    """Neighbouring ranks, `ranks` of them, whose heads of each tensor are as many, and all the same or side by side.

    width: the numbers that one token has for one of them. is_own: this rank alone, whose tokens stay where they are.
    """

    ranks: int
    heads: tuple[HeadSlice, ...]
    width: int
    is_own: bool

    @property
    def each(self) -> tuple[int, ...]:
        """How many heads one of them has of each tensor."""
        return tuple(heads.each for heads in self.heads)


@dataclass(frozen=True)
class BufferLayout:
    """What one rank sends and receives when tokens [B, s] of all heads become tokens [B, S] of some, or the reverse.

    heads: of this rank, of each tensor. width: the numbers that they are for one token; all_widths: of all ranks.
    mine, sent: its tokens, and those that travel: all but its own where the others are neighbours, and few; between two
        others its own go through the all-to-all too, and are copied once more.
    travelling: the numbers of all heads and my tokens, as far as they travel.
    by_heads: for each rank, the numbers of its heads and my tokens. by_tokens: those of my heads and its tokens. None
        where all ranks have as many of both, since the call takes time for each size.
    ranges: the ranks that have any heads, in order.
    shares: for each tensor, whether ranks share heads.
    """

    heads: tuple[int, ...]
    width: int
    all_widths: int
    mine: range
    sent: range
    travelling: int
    by_heads: list[int] | None
    by_tokens: list[int] | None
    ranges: tuple[RankRange, ...]
    shares: tuple[bool, ...]


@lru_cache(maxsize=1024)
def buffer_layout(
    plan: HeadPlan, kinds: tuple[Kind, ...], sizes: tuple[int, ...], batch: int, length: int, me: int
) -> BufferLayout:
    """The layout of rank `me`, of tensors with these kinds of heads, each of so many numbers a head."""
    return _laid_out(plan, kinds, sizes, batch, length, me)


# Apart from its cache, which mutation testing does not look behind.
def _laid_out(
    plan: HeadPlan, kinds: tuple[Kind, ...], sizes: tuple[int, ...], batch: int, length: int, me: int
) -> BufferLayout:
    ranks = len(plan.query)
    cut, spread = spans(length, ranks), [getattr(plan, kind) for kind in kinds]
    mine = cut[me]
    widths = [sum(len(heads[rank]) * size for heads, size in zip(spread, sizes, strict=True)) for rank in range(ranks)]
    by_heads = [len(mine) * batch * width for width in widths]
    by_tokens = [len(span) * batch * widths[me] for span in cut]
    sent, own = range(0, length), None
    if ranks <= _FEW and me in (0, ranks - 1):
        sent, own = (range(0, mine.start) if me else range(mine.stop, length)), me
        by_heads[me] = by_tokens[me] = 0
    are_equal = ranks > _FEW and len({*map(len, cut)}) == len({*widths}) == 1
    ranges: list[RankRange] = []
    first = 0
    while first < ranks:
        stop = _end_of_run(first, spread, own)
        if widths[first]:
            ranges.append(
                RankRange(
                    stop - first,
                    tuple(_heads_of_run(heads, first, stop) for heads in spread),
                    widths[first],
                    first == own,
                )
            )
        first = stop
    return BufferLayout(
        tuple(len(heads[me]) for heads in spread),
        widths[me],
        sum(widths),
        mine,
        sent,
        sum(by_heads),
        None if are_equal else by_heads,
        None if are_equal else by_tokens,
        tuple(ranges),
        tuple(any(left.stop > right.start for left, right in pairwise(heads)) for heads in spread),
    )


def _end_of_run(first: int, spread: list[tuple[range, ...]], own: int | None) -> int:
    """Where the range of ranks that begins with `first` stops."""
    stop = first + 1
    while stop < len(spread[0]) and own not in (first, stop):
        for heads in spread:
            step = heads[first + 1].start - heads[first].start
            alike = len(heads[stop]) == len(heads[first]) and heads[stop].start - heads[stop - 1].start == step
            if not alike or step not in (0, len(heads[first])):
                return stop
        stop += 1
    return stop


def _heads_of_run(heads: tuple[range, ...], first: int, stop: int) -> HeadSlice:
    same = stop - first > 1 and heads[first + 1].start == heads[first].start
    return HeadSlice(heads[first].start, len(heads[first]), same)
