"""What a mask lets each query see, as an interval of real keys, and the runs of queries whose intervals move alike.

Take the real keys of all rows one after the other. Causality, windows, documents and padding leave every query an
interval of them, and from one query to the next the ends of the interval stay, move on by one, or jump. This is exact
for every such mask, padding between real tokens included.

It is computed on the host, and reads documents and padding back to it: kernels keep what they make of it with the mask
(`Mask.once`).
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention.kernels.request import Mask

# How the interval of a query goes over into that of the next: anyhow, not at all, by the end alone (and by the start
# where the window holds it), by the start alone, or by both at less distance than the window.
JUMPS, STAYS, GROWS, SHRINKS, SLIDES = range(5)


@dataclass(frozen=True)
class Run:
    """Queries that follow each other in one row, and whose intervals move in one way.

    kind: that way; JUMPS for one query alone.
    queries: which of B * Sq queries they are. keys: the real keys that they see, counted over all rows.
    first: how many of these keys the first query sees.
    """

    kind: int
    queries: range
    keys: range
    first: int


def has_intervals(mask: Mask) -> bool:
    """Whether causality, a window, documents and padding are all that a mask has."""
    return mask.explicit is None and mask.function is None


def contiguous(mask: Mask) -> bool:
    """Whether a mask has intervals, and no padding lies between real keys of a document."""
    if not has_intervals(mask) or mask.padding is None:
        return has_intervals(mask)
    real = mask.padding.cpu().flatten().nonzero()[:, 0]
    together = real.diff() == 1
    together |= (real // mask.key_length).diff() != 0
    if mask.documents is not None:
        together |= mask.documents.cpu().flatten()[real].diff() != 0
    return bool(together.all())


def widest(mask: Mask) -> int | None:
    """The largest number of keys that the window lets a query see."""
    return mask.window if mask.window is None or mask.causal else 2 * mask.window - 1


def runs(mask: Mask) -> tuple[list[Run], Tensor]:
    """All runs in order, and which of B * Sk keys are real: int64. Queries that see nothing are in no run.

    Each run starts behind the one before it and is as long as it can be.
    """
    seeing, starts, stops, real = _seen(mask)
    steps = _steps(starts, stops, widest(mask))
    steps[(seeing.diff() > 1) | (seeing[1:] % mask.query_length == 0)] = JUMPS
    kinds, firsts, lasts = torch.tensor([*_alike(steps, len(seeing))], dtype=torch.int64).reshape(-1, 3).unbind(1)
    columns = kinds, seeing[firsts], seeing[lasts], starts[firsts], stops[firsts], stops[lasts]
    found = [
        Run(kind, range(first, last + 1), range(start, stop), end - start)
        for kind, first, last, start, end, stop in torch.stack(columns, 1).tolist()
    ]
    return found, real


def _seen(mask: Mask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int64: which of B * Sq queries see something, from which real key and up to which; and which keys are real."""
    if not has_intervals(mask):
        raise ValueError("a mask function or a mask tensor leaves no intervals; see has_intervals")
    batch, length = mask.batch, mask.key_length
    position = torch.arange(mask.query_length) + mask.offset
    low, high = torch.zeros(batch, len(position), dtype=torch.int64), torch.full((batch, len(position)), length)
    if mask.causal:
        high = high.minimum(position + 1)
    if mask.window is not None:
        low = low.maximum(position - mask.window + 1)
        high = high if mask.causal else high.minimum(position + mask.window)
    if mask.documents is not None:
        documents = mask.documents.cpu().contiguous()
        own = documents[:, position].contiguous()
        low = low.maximum(torch.searchsorted(documents, own))
        high = high.minimum(torch.searchsorted(documents, own, right=True))
    low = low.clamp_max(length)
    row = torch.arange(batch)[:, None] * length
    starts, stops, real = (row + low).flatten(), (row + high).flatten(), torch.arange(batch * length)
    if mask.padding is not None:
        padding = mask.padding.cpu().flatten()
        before = F.pad(padding.cumsum(0), (1, 0))
        starts, stops, real = before[starts], before[stops], padding.nonzero()[:, 0]
    seeing = (starts < stops).nonzero()[:, 0]
    return seeing, starts[seeing], stops[seeing], real


def _steps(starts: Tensor, stops: Tensor, widest: int | None) -> Tensor:
    """[queries - 1] of the kinds above."""
    start, stop = starts.diff(), stops.diff()
    grown = starts[:-1] if widest is None else starts[:-1].maximum(stops[1:] - widest)
    kinds = torch.full_like(start, JUMPS, dtype=torch.int8)
    kinds[(start == 1) & (stop == 1) & (stops[:-1] - starts[:-1] > 1)] = SLIDES
    kinds[(start == 1) & (stop == 0)] = SHRINKS
    kinds[(start == 0) & (stop == 0)] = STAYS
    kinds[(stop == 1) & (starts[1:] == grown)] = GROWS
    return kinds


def _alike(steps: Tensor, queries: int) -> Iterator[tuple[int, int, int]]:
    """(kind, first, last): queries that follow each other by steps of one kind; JUMPS for one query alone."""
    kinds, counts = torch.unique_consecutive(steps, return_counts=True)
    ends = counts.cumsum(0).tolist()
    kinds_of, query = kinds.tolist(), 0
    while query < queries:
        at = bisect_left(ends, query + 1)
        if query == queries - 1 or kinds_of[at] == JUMPS:
            yield JUMPS, query, query
            query += 1
        else:
            yield kinds_of[at], query, ends[at]
            query = ends[at] + 1
