"""Kernel `sdpa`: torch's own scaled_dot_product_attention, on any device torch has it for.

Causal, windowed, chunked, padded and packed masks are cut into pieces, each of which torch does with no mask, with its
causal flag, or with one narrow band of mask that all pieces share. Any other mask, and a bias, is done tile by tile:
some queries and the keys that they see, with the mask of these alone. So no S × S tensor exists, unless it was given.

An attention sink is one more key, without a value. Its score comes out of the product of queries and keys, which get
two more elements for it, so torch is asked for nothing new and its gradient takes the usual way.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sp_attention.kernels.cudnn import without_cudnn
from sp_attention.kernels.hookspecs import hookimpl
from sp_attention.kernels.request import Backend, Mask, Request, Segment

# Queries per piece of a sliding window, and per tile. A piece of T queries reads T + window - 1 keys, so few queries
# waste memory traffic and many compute scores that the window hides.
BAND = 256
HALF = (torch.float16, torch.bfloat16)


@hookimpl
def sp_attention_backends() -> list[Backend]:
    return [Backend(device="any", kernel="sdpa", attend=attend, priority=10, refuses=refuses)]


def refuses(request: Request) -> str | None:
    """The reason why torch's SDPA cannot do this exactly, None when it can."""
    if request.softcap is not None:
        return "torch's scaled_dot_product_attention has no softcap"
    # On an H200 (torch 2.11), windows of 100 in 600 and 4,096 tokens: outputs right, gradients of queries wrong, and
    # right in float32. Probably cuDNN's doing, which is kept away since, but that has not been run on a device yet.
    in_half = request.query.device.type == "cuda" and request.query.dtype in HALF
    if in_half and torch.is_grad_enabled() and _asks_for_masks(request):
        return (
            "in half precision on CUDA, gradients of torch's scaled_dot_product_attention with a mask, which a window, "
            "a bias or a mask tensor needs, were found wrong"
        )
    return None


def _asks_for_masks(request: Request) -> bool:
    """Whether torch may be given a mask for it."""
    return request.mask.window is not None or request.bias is not None or request.mask.segments is None


@dataclass(frozen=True)
class Piece:
    """Queries × keys with one pattern.

    Everything ("full"), the causal square, a band around the diagonal, or what the mask says there ("tile").
    """

    queries: range
    keys: range
    pattern: str


def attend(request: Request) -> Tensor:
    """Attention by torch; see `Request` and `Backend.attend` for the contract."""
    mask, segments = request.mask, request.mask.segments
    request = _with_room_for_sinks(request)
    if segments is None or request.bias is not None:
        return _attend_by_tiles(request, mask.once(("sdpa tiles", BAND), lambda: tuple(_tiles(mask))))
    plans = mask.once("sdpa pieces", lambda: tuple(tuple(_pieces(row, mask)) for row in segments))
    if len(plans) == 1:
        return _attend_row(request, slice(None), plans[0])
    return torch.cat([_attend_row(request, slice(row, row + 1), plan) for row, plan in enumerate(plans)])


def _pieces(segments: tuple[Segment, ...], mask: Mask) -> Iterator[Piece]:
    """What each query of a row sees, in order of the queries; queries that see nothing are left out."""
    for segment in segments:
        real = range(segment.first, segment.last)
        if not len(real):
            continue
        farthest = max(segment.stop - segment.first, 0 if mask.causal else segment.last - segment.start)
        if mask.window is not None and mask.window < farthest:
            yield from _banded_pieces(segment, mask.window, mask.causal)
        elif not mask.causal:
            yield Piece(range(segment.start, segment.stop), real, "full")
        else:
            yield Piece(real, real, "causal")
            if segment.last < segment.stop:
                yield Piece(range(segment.last, segment.stop), real, "full")


def _banded_pieces(segment: Segment, window: int, causal: bool) -> Iterator[Piece]:
    """The queries that are near enough to a real key; in a causal mask, the first `window` see all before them."""
    if causal:
        start = min(segment.first + window, segment.last)
        yield Piece(range(segment.first, start), range(segment.first, start), "causal")
    else:
        start = max(segment.start, segment.first - window + 1)
    stop = min(segment.stop, segment.last + window - 1)
    while start < stop:
        end = min(start + BAND, stop)
        reach = end if causal else end + window - 1
        yield Piece(range(start, end), range(max(segment.first, start - window + 1), min(reach, segment.last)), "band")
        start = end


def _tiles(mask: Mask) -> Iterator[Piece]:
    """The queries in tiles, each with the keys from the first to the last that any of them sees."""
    tiles = [range(start, min(start + BAND, mask.query_length)) for start in range(0, mask.query_length, BAND)]
    found = []
    for queries in tiles:
        allowed = mask.dense(queries)
        seen = allowed.any(0).any(0).any(0).int()
        hidden = allowed.numel() - allowed.sum()
        found.append(torch.stack([seen.argmax(), seen.flip(0).argmax(), seen.any(), hidden]))
    for queries, (first, behind, some, hidden) in zip(tiles, torch.stack(found).tolist(), strict=True):
        keys = range(first, mask.key_length - behind) if some else range(0, 0)
        yield Piece(queries, keys, "tile" if hidden else "full")


def _attend_by_tiles(request: Request, tiles: tuple[Piece, ...]) -> Tensor:
    """[B, Sq, h, Dv], tile by tile. In training, each is computed again in backward: torch would keep its mask else."""
    queries = request.query.split(BAND, 1)
    biases: tuple[Tensor | None, ...] = (None,) * len(tiles)
    if request.bias is not None:
        biases = request.bias.expand(-1, -1, request.query.shape[1], -1).split(BAND, 2)
    outputs = []
    for tile, query, bias in zip(tiles, queries, biases, strict=True):
        if len(tiles) > 1 and torch.is_grad_enabled():
            draws, parts = request.dropout > 0, (request, tile, query, bias)
            outputs.append(checkpoint(_attend_tile, *parts, use_reentrant=False, preserve_rng_state=draws))
        else:
            outputs.append(_attend_tile(request, tile, query, bias))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _attend_tile(request: Request, tile: Piece, query: Tensor, bias: Tensor | None) -> Tensor:
    if not len(tile.keys):
        return _nothing_seen(query, request.value, query.shape[1])
    keys = slice(tile.keys.start, tile.keys.stop)
    # torch wants it in the dtype of the queries.
    mask = None if bias is None else bias[..., keys].to(query.dtype)
    blind = None
    if tile.pattern == "tile":
        allowed = request.mask.dense(tile.queries)[..., keys]
        # Kernels differ in what they give queries that see nothing, so these see all, and what they give is hidden.
        blind = ~allowed.any(-1, keepdim=True)
        allowed = allowed | blind
        mask = allowed if mask is None else torch.where(allowed, mask, float("-inf"))
    if mask is not None and request.sinks is not None:
        mask = F.pad(mask, (1, 0), value=mask.dtype == torch.bool)
    out = _sdpa(query, request.key[:, keys], request.value[:, keys], request, mask=mask, causal=False)
    return out if blind is None else out.masked_fill(blind.transpose(1, 2), 0.0)


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


def _band(request: Request, queries: range, keys: range) -> Tensor:
    """Additive [queries, keys], with sinks [queries, 1 + keys]: 0 where a query sees a key, -inf elsewhere.

    Pieces of one shape share it. Additive from the start, since torch would make and save an additive copy of a bool
    mask for every piece.
    """
    like, mask = request.query, request.mask
    window, offset = mask.window, queries.start - keys.start
    assert window is not None

    def derive() -> Tensor:
        distance = torch.arange(len(queries))[:, None] + offset - torch.arange(len(keys))
        hidden = (distance < (0 if mask.causal else 1 - window)) | (distance >= window)
        if request.sinks is not None:
            hidden = F.pad(hidden, (1, 0), value=False)
        return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf")).to(like.device)

    return mask.once(("sdpa band", len(queries), len(keys), offset, like.dtype, request.sinks is not None), derive)


def _with_room_for_sinks(request: Request) -> Request:
    """Queries and keys with further elements whose product is the sink's score for the sink, and 0 for all else."""
    if request.sinks is None:
        return request
    query, key = request.query, request.key
    score = request.sinks.to(torch.promote_types(request.sinks.dtype, torch.float32)) / request.scale
    # In two elements, since one of a low precision would round the score.
    rough = score.to(query.dtype)
    rest = (score - rough.to(score.dtype)).to(query.dtype)
    elements = torch.stack([rough, rest], -1).expand(*query.shape[:2], -1, -1)
    # Fused kernels want a multiple of 8 elements.
    room = -(query.shape[3] + 2) % 8
    return replace(request, query=torch.cat([F.pad(query, (0, room)), elements], -1), key=F.pad(key, (0, room + 2)))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, request: Request, *, mask: Tensor | None, causal: bool) -> Tensor:
    """torch's function on [B, S, h, D] tensors, head sizes made equal with zeros where they differ.

    With sinks, `mask` has a column for the sink before those of the keys.
    """
    if request.sinks is not None:
        sink = F.pad(key.new_ones(2), (key.shape[3] - 2, 0)).expand(key.shape[0], 1, key.shape[2], -1)
        key, value = torch.cat([sink, key], 1), F.pad(value, (0, 0, 0, 0, 1, 0))
        if causal:
            # A query of no meaning keeps the others on the diagonal.
            query = F.pad(query, (0, 0, 0, 0, 1, 0))
            return _torch(query, key, value, request, mask=mask, causal=True)[:, 1:]
    return _torch(query, key, value, request, mask=mask, causal=causal)


def _torch(query: Tensor, key: Tensor, value: Tensor, request: Request, *, mask: Tensor | None, causal: bool) -> Tensor:
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
    with without_cudnn():
        out = F.scaled_dot_product_attention(
            query, key, value, mask, request.dropout, is_causal=causal, scale=request.scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)[..., :value_size]
