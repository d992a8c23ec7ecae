"""Kernel `sdpa`: torch's own scaled_dot_product_attention, on any device torch has it for.

Causal, windowed, padded and packed masks are cut into pieces, each of which torch does with no mask, with its causal
flag, or with one narrow band of mask that all pieces share. So no S × S tensor exists for them. An explicit mask, a
bias, or padding between real keys is given to torch as a dense mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention.attention import Backend, Mask, Request, Segment
from sp_attention.hookspecs import hookimpl
from sp_attention.layout import Span

# Queries per piece of a sliding window. A piece of T queries reads T + window - 1 keys, so few queries waste memory
# traffic and many compute scores that the window hides.
BAND = 256


@hookimpl
def sp_attention_backends() -> list[Backend]:
    return [Backend(device="any", kernel="sdpa", attend=attend, priority=10, refuses=refuses)]


def refuses(request: Request) -> str | None:
    """The reason why torch's SDPA cannot do this exactly, None when it can."""
    if request.softcap is not None:
        return "torch's scaled_dot_product_attention has no softcap"
    if request.sinks is not None:
        return "torch's scaled_dot_product_attention has no attention sinks"
    return None


@dataclass(frozen=True)
class Piece:
    """Queries × keys with one pattern: everything ("full"), the causal square, or a band of the causal diagonal."""

    queries: Span
    keys: Span
    pattern: str


def attend(request: Request) -> Tensor:
    """Attention by torch; see `Request` and `Backend.attend` for the contract."""
    mask, segments = request.mask, request.mask.segments
    if segments is None or request.bias is not None:
        return _attend_densely(request)
    plans = mask.once("sdpa pieces", lambda: tuple(tuple(_pieces(row, mask)) for row in segments))
    if len(plans) == 1:
        return _attend_row(request, slice(None), plans[0])
    return torch.cat([_attend_row(request, slice(row, row + 1), plan) for row, plan in enumerate(plans)])


def _pieces(segments: tuple[Segment, ...], mask: Mask) -> Iterator[Piece]:
    """What each query of a row sees, in order of the queries; queries that see nothing are left out."""
    for segment in segments:
        real = Span(segment.first, segment.last)
        if not len(real):
            continue
        if not mask.causal:
            yield Piece(Span(segment.start, segment.stop), real, "full")
        elif mask.window is None or mask.window >= segment.stop - segment.first:
            yield Piece(real, real, "causal")
            if segment.last < segment.stop:
                yield Piece(Span(segment.last, segment.stop), real, "full")
        else:
            yield from _banded_pieces(segment, mask.window)


def _banded_pieces(segment: Segment, window: int) -> Iterator[Piece]:
    """The first `window` real tokens see all before them; the others a band, up to the last that sees a real key."""
    start = min(segment.first + window, segment.last)
    yield Piece(Span(segment.first, start), Span(segment.first, start), "causal")
    stop = min(segment.stop, segment.last + window - 1)
    while start < stop:
        end = min(start + BAND, stop)
        yield Piece(Span(start, end), Span(max(segment.first, start - window + 1), min(end, segment.last)), "band")
        start = end


def _attend_row(request: Request, rows: slice, pieces: tuple[Piece, ...]) -> Tensor:
    """The rows of a batch that share their pieces: [rows, S, h, Dv]."""
    query, key, value = request.query[rows], request.key[rows], request.value[rows]
    outputs, done = [], 0
    for piece in pieces:
        at, of = piece.queries, piece.keys
        if at.start > done:
            outputs.append(_nothing_seen(query, value, at.start - done))
        band = _band(request, at, of) if piece.pattern == "band" else None
        parts = query[:, at.start : at.stop], key[:, of.start : of.stop], value[:, of.start : of.stop]
        outputs.append(_sdpa(*parts, request, mask=band, causal=piece.pattern == "causal"))
        done = at.stop
    if query.shape[1] > done:
        outputs.append(_nothing_seen(query, value, query.shape[1] - done))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _nothing_seen(query: Tensor, value: Tensor, length: int) -> Tensor:
    return query.new_zeros(query.shape[0], length, query.shape[2], value.shape[3])


def _band(request: Request, queries: Span, keys: Span) -> Tensor:
    """Additive [queries, keys]: 0 where a query sees a key, -inf elsewhere; pieces of one shape share it.

    Additive from the start, since torch would make and save an additive copy of a bool mask for every piece.
    """
    like, mask = request.query, request.mask
    window, offset = mask.window, queries.start - keys.start
    assert window is not None

    def derive() -> Tensor:
        distance = torch.arange(len(queries))[:, None] + offset - torch.arange(len(keys))
        hidden = (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf")).to(like.device)

    return mask.once(("sdpa band", len(queries), len(keys), offset, like.dtype), derive)


def _attend_densely(request: Request) -> Tensor:
    mask = request.mask.dense()
    if request.bias is not None:
        mask = torch.where(mask, request.bias, float("-inf"))
    return _sdpa(request.query, request.key, request.value, request, mask=mask, causal=False)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, request: Request, *, mask: Tensor | None, causal: bool) -> Tensor:
    """torch's function on [B, S, h, D] tensors, head sizes made equal with zeros where they differ."""
    size, value_size = query.shape[3], value.shape[3]
    query, key, value = (
        F.pad(t, (0, max(size, value_size) - t.shape[3])).transpose(1, 2) if size != value_size else t.transpose(1, 2)
        for t in (query, key, value)
    )
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None and query.device.type != "cpu":
        # Off the CPU, torch leaves its fused kernels for grouped heads together with a mask.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    out = F.scaled_dot_product_attention(
        query, key, value, mask, request.dropout, is_causal=causal, scale=request.scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)[..., :value_size]
