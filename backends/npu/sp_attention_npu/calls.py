"""A mask as calls of the operator: integers and indices only, worked out once per mask.

The operator's words: in sparse mode 3 a query sees what is not after it, and in mode 4 those keys that are at most
`before` before it and at most `after` after it, where the last query of a sequence stands at its last key. So the keys
of a call end where its queries end, or `before` and `after` make up for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sp_attention.kernels.request import Mask, Segment

# The operator's way to say that there is no limit on one side.
UNLIMITED = 2**31 - 1
# How many sequences one call takes, and how many tokens (torch-npu's documentation of npu_fusion_attention).
SEQUENCES, TOKENS = 1024, 2**20


@dataclass(frozen=True)
class Pattern:
    """What a query sees of the keys in its sequence: the operator's sparse mode, and its limits in mode 4."""

    mode: int
    before: int = UNLIMITED
    after: int = UNLIMITED


FULL, CAUSAL = Pattern(0), Pattern(3)


@dataclass(frozen=True)
class Whole:
    """One call for the whole batch: all queries, and those keys, which are the same for every row."""

    keys: range
    pattern: Pattern


@dataclass(frozen=True, eq=False)
class Packed:
    """One call for sequences of different lengths, end to end.

    queries, keys: int64 places in [B * Sq] and [B * Sk] that are taken; None where it is all of them, in order.
    query_ends, key_ends: where each sequence ends, without a zero in front.
    kept: the outputs that are wanted, None for all. places: where in [B * Sq] these belong.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_ends: tuple[int, ...]
    key_ends: tuple[int, ...]
    pattern: Pattern
    kept: Tensor | None
    places: Tensor


@dataclass(frozen=True, eq=False)
class Dense:
    """One call with a mask of every query and key.

    hidden: bool [1|B, 1|h, Sq, Sk], True where a query does not see a key; all False for a query that sees none, since
        nothing is known of what the operator does then. blind: bool [1|B, Sq, 1|h, 1], those queries.
    """

    hidden: Tensor
    blind: Tensor


def calls(mask: Mask) -> Whole | Dense | tuple[Packed, ...]:
    """How to compute attention with this mask exactly. Reads documents and padding to the host, once per mask.

    Queries that no packed call has see nothing.
    """
    return mask.once("npu calls", lambda: _calls(mask))


def _calls(mask: Mask) -> Whole | Dense | tuple[Packed, ...]:
    whole = _whole(mask)
    if whole is not None:
        return whole
    packed = _packed(mask)
    # Only what is made of it is kept.
    return dense(mask.dense(range(0, mask.query_length))) if packed is None else packed


def dense(allowed: Tensor) -> Dense:
    """The call with a mask of every query and key: bool [1|B, 1|h, Sq, Sk], True where a query sees a key."""
    blind = ~allowed.any(-1, keepdim=True)
    return Dense(~allowed & ~blind, blind.transpose(1, 2))


def _whole(mask: Mask) -> Whole | None:
    if any(part is not None for part in (mask.documents, mask.padding, mask.explicit, mask.function)):
        return None
    start, stop, length = mask.offset, mask.offset + mask.query_length, mask.key_length
    if not mask.causal and mask.window is None:
        return Whole(range(0, length), FULL)
    if stop > length:
        return None
    if mask.window is None:
        return Whole(range(0, stop), CAUSAL)
    last = stop if mask.causal else min(length, stop + mask.window - 1)
    return Whole(range(max(0, start - mask.window + 1), last), _near(mask, stop - last))


def _near(mask: Mask, ahead: int) -> Pattern:
    """The window, where the last query stands `ahead` of the last key."""
    assert mask.window is not None
    return Pattern(4, mask.window - 1 - ahead, ahead if mask.causal else mask.window - 1 + ahead)


def _packed(mask: Mask) -> tuple[Packed, ...] | None:
    segments = mask.segments
    if segments is None:
        return None
    rows = segments * mask.batch if len(segments) == 1 else segments
    found = [*_real_queries(rows, mask), *_later_queries(rows, mask)]
    return tuple(call for parts, pattern in found for call in _pack(parts, pattern, mask))


@dataclass(frozen=True)
class _Part:
    """One sequence of a packed call: queries and keys of a row, and how many of these queries it is for."""

    row: int
    queries: range
    keys: range
    wanted: int


_Parts = tuple[list[_Part], Pattern]


def _real_queries(rows: tuple[tuple[Segment, ...], ...], mask: Mask) -> Iterator[_Parts]:
    """The queries up to the last real key of their segment."""
    parts = []
    for row, segment in _with_keys(rows):
        start, stop = segment.first, segment.last
        if not mask.causal:
            # Those before the first real key see it too, if it is near enough.
            start = segment.start if mask.window is None else max(segment.start, segment.first - mask.window + 1)
            stop = segment.stop if mask.window is None else segment.last
        parts.append(_Part(row, range(start, stop), range(segment.first, segment.last), stop - start))
    pattern = _near(mask, 0) if mask.window is not None else CAUSAL if mask.causal else FULL
    yield parts, pattern


def _later_queries(rows: tuple[tuple[Segment, ...], ...], mask: Mask) -> Iterator[_Parts]:
    """The queries after the last real key, of which a window leaves the first few, and of their keys the last few."""
    if not mask.causal and mask.window is None:
        return
    parts = []
    behind = [(row, segment) for row, segment in _with_keys(rows) if segment.last < segment.stop]
    if mask.window is None:
        for row, segment in behind:
            queries = range(segment.last, segment.stop)
            parts.append(_Part(row, queries, range(segment.first, segment.last), len(queries)))
        yield parts, FULL
        return
    # The limits hold for all sequences of a call, so all get as many queries, whatever these are, and not all are kept.
    longest = max((segment.stop - segment.last for _, segment in behind), default=0)
    count = min(longest, mask.window - 1)
    for row, segment in behind if count else ():
        keys = range(max(segment.first, segment.last - mask.window + 1), segment.last)
        queries = range(segment.last, segment.last + count)
        parts.append(_Part(row, queries, keys, min(count, segment.stop - segment.last)))
    yield parts, Pattern(4, mask.window - 1 - count)


def _with_keys(rows: tuple[tuple[Segment, ...], ...]) -> Iterator[tuple[int, Segment]]:
    return ((row, segment) for row, segments in enumerate(rows) for segment in segments if segment.first < segment.last)


def _pack(parts: list[_Part], pattern: Pattern, mask: Mask) -> Iterator[Packed]:
    for some in _batches(parts):
        queries = _places([(part.row, part.queries) for part in some], mask.batch, mask.query_length)
        keys = _places([(part.row, part.keys) for part in some], mask.batch, mask.key_length)
        wanted = torch.cat([torch.arange(len(part.queries)) < part.wanted for part in some])
        yield Packed(
            queries=None if _is_all(queries, mask.batch * mask.query_length) else queries.to(mask.device),
            keys=None if _is_all(keys, mask.batch * mask.key_length) else keys.to(mask.device),
            query_ends=tuple(accumulate(len(part.queries) for part in some)),
            key_ends=tuple(accumulate(len(part.keys) for part in some)),
            pattern=pattern,
            kept=None if bool(wanted.all()) else wanted.nonzero()[:, 0].to(mask.device),
            places=queries[wanted].to(mask.device),
        )


def _batches(parts: list[_Part]) -> Iterator[list[_Part]]:
    """The sequences in groups that one call takes."""
    batch: list[_Part] = []
    tokens = 0
    for part in parts:
        more = max(len(part.queries), len(part.keys))
        if batch and (len(batch) == SEQUENCES or tokens + more > TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(part)
        tokens += more
    if batch:
        yield batch


def _places(spans: list[tuple[int, range]], rows: int, length: int) -> Tensor:
    """Rows' spans as places in [rows * length]. Those beyond the end, of queries that are not kept, are the last."""
    return torch.cat([row * length + torch.arange(span.start, span.stop) for row, span in spans]).clamp(
        max=rows * length - 1
    )


def _is_all(places: Tensor, length: int) -> bool:
    return len(places) == length and bool((places == torch.arange(length)).all())
