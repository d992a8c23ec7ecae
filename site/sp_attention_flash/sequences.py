"""From a mask to the sequences that flash-attn attends in.

Take the real keys of all rows one after the other. Causality, windows, documents and padding leave every query an
interval of them, and from one query to the next the ends of the interval stay, move on by one, or jump. Queries among
whom they move in one way are a sequence, which a kernel does without knowing anything of padding or documents:

    the end moves on, the start stays or keeps its distance    causal, with a window
    neither moves                                              all queries see all keys
    the start moves on, the end stays                          causal, with queries and keys in reverse order
    both move on, at less distance than the window             causal, with a narrower window

flash-attn aligns the last query of a sequence with its last key, so a query may see keys before all queries. Queries
that see nothing are in no sequence. This is exact for every such mask, padding between real tokens included, and reads
documents and padding back to the host once per mask.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention import Mask


@dataclass(frozen=True)
class Pattern:
    """What queries see in a sequence whose last query stands beside its last key.

    causal: nothing behind themselves. before, after: at most so many keys on either side of themselves; None is all.
    """

    causal: bool = False
    before: int | None = None
    after: int | None = None


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of one pattern, one after the other.

    queries, keys: int64 [Tq], [Tk]: which of B * Sq queries and B * Sk keys they are; None for all of them in order.
    query_edges, key_edges: int32 [sequences + 1]: where each sequence starts and ends.
    """

    pattern: Pattern
    queries: Tensor | None
    keys: Tensor | None
    query_edges: Tensor
    key_edges: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True, eq=False)
class Cut:
    """A mask cut into sequences.

    places: int64 [B * Sq]: where each query's output is among those of all calls, one after the other; behind the last
        for queries that see nothing. None where it is in its place.
    """

    calls: tuple[Sequences, ...]
    places: Tensor | None


def uncut(mask: Mask) -> tuple[Pattern, int] | None:
    """The pattern that every row of a mask has as a whole, and how many of its keys take part; None if none has."""
    if mask.documents is not None or mask.padding is not None:
        return None
    length, end = mask.key_length, mask.offset + mask.query_length
    if not mask.causal and mask.window is None:
        return Pattern(), length
    if mask.causal:
        return (_causal(mask.window), end) if end <= length else None
    assert mask.window is not None
    return (Pattern(False, mask.window - 1, mask.window - 1), length) if end == length else None


def cut(mask: Mask) -> Cut:
    """The sequences of a mask; computed on the host, the result is on the mask's device."""
    starts, stops, real = _intervals(mask)
    seeing = (starts < stops).nonzero()[:, 0]
    starts, stops = starts[seeing], stops[seeing]
    widest = None if mask.window is None else mask.window if mask.causal else 2 * mask.window - 1
    parts: dict[Pattern, list[tuple[Tensor, Tensor]]] = {}
    for first, last, kind in _runs(_steps(starts, stops, widest), len(seeing)):
        queries, keys = seeing[first : last + 1], real[int(starts[first]) : int(stops[last])]
        if kind == SHRINKS:
            queries, keys = queries.flip(0), keys.flip(0)
        own = int(stops[first] - starts[first]) if kind == SLIDES else widest
        # One query alone sees all its keys in any pattern: in the one that there is anyway.
        everything = kind == STAYS or (kind == JUMPS and not mask.causal and mask.window is None)
        parts.setdefault(Pattern() if everything else _causal(own), []).append((queries, keys))
    total = mask.batch * mask.query_length
    order = torch.cat([queries for pieces in parts.values() for queries, _ in pieces] or [seeing])
    places = torch.full((total,), len(order)).scatter_(0, order, torch.arange(len(order)))
    calls = tuple(_sequences(pattern, pieces, mask) for pattern, pieces in parts.items())
    return Cut(calls, _unless_in_order(places, total, mask.device))


def _causal(window: int | None) -> Pattern:
    return Pattern(True) if window is None else Pattern(True, window - 1, 0)


def _intervals(mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    """For each of B * Sq queries, the interval of real keys it sees; and which of B * Sk keys are real, in order."""
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
    real = torch.ones(batch, length, dtype=torch.bool) if mask.padding is None else mask.padding.cpu()
    before = F.pad(real.flatten().cumsum(0), (1, 0))
    row = torch.arange(batch)[:, None] * length
    return before[row + low].flatten(), before[row + high].flatten(), real.flatten().nonzero()[:, 0]


# How the interval of a query goes over into that of the next.
JUMPS, STAYS, GROWS, SHRINKS, SLIDES = range(5)


def _steps(starts: Tensor, stops: Tensor, widest: int | None) -> Tensor:
    """[queries - 1] of the kinds above; `widest` is the largest number of keys that the window lets a query see."""
    start, stop = starts.diff(), stops.diff()
    grown = starts[:-1] if widest is None else starts[:-1].maximum(stops[1:] - widest)
    kinds = torch.full_like(start, JUMPS)
    kinds[(start == 1) & (stop == 1) & (stops[:-1] - starts[:-1] > 1)] = SLIDES
    kinds[(start == 1) & (stop == 0)] = SHRINKS
    kinds[(start == 0) & (stop == 0)] = STAYS
    kinds[(stop == 1) & (starts[1:] == grown)] = GROWS
    return kinds


def _runs(steps: Tensor, queries: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, kind): queries that follow each other by steps of one kind; JUMPS for one query alone.

    Each starts behind the one before it and is as long as it can be.
    """
    kinds, counts = torch.unique_consecutive(steps, return_counts=True)
    ends = counts.cumsum(0).tolist()
    kinds_of, query = kinds.tolist(), 0
    while query < queries:
        at = bisect_left(ends, query + 1)
        if query == queries - 1 or kinds_of[at] == JUMPS:
            yield query, query, JUMPS
            query += 1
        else:
            yield query, ends[at], kinds_of[at]
            query = ends[at] + 1


def _sequences(pattern: Pattern, pieces: list[tuple[Tensor, Tensor]], mask: Mask) -> Sequences:
    queries, keys = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    lengths = torch.tensor([[len(part) for part in piece] for piece in pieces])
    edges = F.pad(lengths.cumsum(0), (0, 0, 1, 0)).int().to(mask.device)
    longest_query, longest_key = lengths.amax(0).tolist()
    return Sequences(
        pattern,
        _unless_in_order(queries, mask.batch * mask.query_length, mask.device),
        _unless_in_order(keys, mask.batch * mask.key_length, mask.device),
        edges[:, 0].contiguous(),
        edges[:, 1].contiguous(),
        longest_query,
        longest_key,
    )


def _unless_in_order(index: Tensor, total: int, device: torch.device) -> Tensor | None:
    return None if torch.equal(index, torch.arange(total)) else index.to(device)
