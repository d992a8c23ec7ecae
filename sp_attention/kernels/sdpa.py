"""Kernel `sdpa`: torch's own scaled_dot_product_attention, on any device torch has it for.

It goes tile by tile: some queries and the keys that they see. Causal, windowed, chunked, padded and packed masks leave
tiles that torch does with no mask, with its causal flag, or with one narrow band of mask that tiles of one shape share.
Any other mask, and a bias, is tiles with the mask of these alone. So no S × S tensor exists, unless it was given.

An attention sink is one more key, without a value. Its score comes out of the product of queries and keys, which get
two more elements for it, so torch is asked for nothing new and its gradient takes the usual way.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sp_attention.kernels.causal_after import causal_after
from sp_attention.kernels.half_precision import in_half_on_cuda, refused, torchs_choice
from sp_attention.kernels.hookspecs import hookimpl
from sp_attention.kernels.intervals import GROWS, JUMPS, STAYS, Run, contiguous, runs
from sp_attention.kernels.request import Backend, Mask, Request

# Queries per tile of a sliding window, or with a mask. In a window T queries read T + window - 1 keys, so few queries
# waste memory traffic and many compute scores that the window hides.
BAND = 256


@hookimpl
def sp_attention_backends() -> list[Backend]:
    return [Backend(device="any", kernel="sdpa", attend=attend, priority=10, refuses=refuses)]


def refuses(request: Request) -> str | None:
    """The reason why torch's SDPA cannot do this exactly, None when it can."""
    if request.softcap is not None:
        return "torch's scaled_dot_product_attention has no softcap"
    if in_half_on_cuda(request) and torch.is_grad_enabled():
        return refused("sdpa", kind(request), request)
    return None


def kind(request: Request) -> str | None:
    """What torch is given a mask for: a bias, any mask, a window's band, later queries; None where it needs none."""
    mask = request.mask
    if request.bias is not None:
        found = "bias"
    elif _tiles_of_rows(mask) is None:
        found = "mask"
    elif mask.window is not None:
        found = "window"
    elif mask.causal and mask.offset > 0:
        found = "later queries"
    else:
        return None
    return found if request.sinks is None else f"{found}, sinks"


@dataclass(frozen=True)
class Tile:
    """Queries × keys of a row with one pattern.

    Everything ("full"), causal up to the last query and key, a band around it, or what the mask says there ("mask").
    """

    queries: range
    keys: range
    pattern: str


def attend(request: Request) -> Tensor:
    """Attention by torch; see `Request` and `Backend.attend` for the contract."""
    mask = request.mask
    rows = _tiles_of_rows(mask) if request.bias is None else None
    request = _with_room_for_sinks(request)
    if rows is None:
        return _attend_with_masks(request, mask.once(("sdpa tiles", BAND), lambda: tuple(_tiles_with_masks(mask))))
    if len(rows) == 1:
        return _attend_row(request, slice(None), rows[0])
    return torch.cat([_attend_row(request, slice(row, row + 1), tiles) for row, tiles in enumerate(rows)])


def _tiles_of_rows(mask: Mask) -> tuple[tuple[Tile, ...], ...] | None:
    """The tiles of each row in order of the queries, those that see nothing left out; one row if all are alike.

    None where padding lies between the real keys of a document.
    """
    return mask.once("sdpa tiles of rows", lambda: _derive_tiles(mask))


def _derive_tiles(mask: Mask) -> tuple[tuple[Tile, ...], ...] | None:
    whole = range(mask.query_length)
    if mask.is_plainly_causal and not mask.offset and mask.query_length == mask.key_length:
        # The most usual mask needs no look at every token.
        return ((Tile(whole, whole, "causal"),),)
    if not contiguous(mask):
        return None
    if mask.documents is None and mask.padding is None:
        mask = replace(mask, batch=1)
    rows: list[list[list[Run]]] = [[] for _ in range(mask.batch)]
    found, real = runs(mask)
    for run in found:
        row, start = divmod(run.queries.start, mask.query_length)
        first = int(real[run.keys.start]) - row * mask.key_length
        run = replace(run, queries=range(start, start + len(run.queries)), keys=range(first, first + len(run.keys)))
        # Runs of one document see some keys in common.
        if rows[row] and run.keys.start < rows[row][-1][-1].keys.stop:
            rows[row][-1].append(run)
        else:
            rows[row].append([run])
    tiles = [tuple(tile for document in row for tile in _tiles_of_document(document, mask)) for row in rows]
    return (tiles[0],) if all(row == tiles[0] for row in tiles) else tuple(tiles)


def _tiles_of_document(document: list[Run], mask: Mask) -> Iterator[Tile]:
    """The runs' queries and keys count in their row, and all keys from the first to the last are real."""
    queries, keys = document[0].queries, document[0].keys
    start, stop, key = queries.start, document[-1].queries.stop, keys.start
    before = document[0].first - 1
    if mask.causal and document[0].kind == GROWS and not (before and mask.window):
        # The first `window` queries see all before them; those of a later part of the sequence, keys before the first.
        start += min(len(queries), mask.window or len(queries))
        yield Tile(range(queries.start, start), range(key, key + before + start - queries.start), "causal")
    left = [run for run in document if run.queries.stop > start]
    if len(left) == 1 and left[0].kind in (STAYS, JUMPS):
        yield Tile(left[0].queries, left[0].keys, "full")
    elif left:
        yield from _bands(range(start, stop), range(key, document[-1].keys.stop), mask)


def _bands(queries: range, keys: range, mask: Mask) -> Iterator[Tile]:
    """Tiles of queries of a window, with those of the keys that are near enough."""
    assert mask.window is not None
    for start in range(queries.start, queries.stop, BAND):
        end = min(start + BAND, queries.stop)
        first, last = start + mask.offset - mask.window + 1, end + mask.offset + (0 if mask.causal else mask.window - 1)
        yield Tile(range(start, end), range(max(keys.start, first), min(keys.stop, last)), "band")


def _tiles_with_masks(mask: Mask) -> Iterator[Tile]:
    """All queries in tiles, each with the keys from the first to the last that any of them sees."""
    tiles = [range(start, min(start + BAND, mask.query_length)) for start in range(0, mask.query_length, BAND)]
    found = []
    for queries in tiles:
        allowed = mask.dense(queries)
        seen = allowed.any(0).any(0).any(0).int()
        hidden = allowed.numel() - allowed.sum()
        found.append(torch.stack([seen.argmax(), seen.flip(0).argmax(), seen.any(), hidden]))
    for queries, (first, behind, some, hidden) in zip(tiles, torch.stack(found).tolist(), strict=True):
        keys = range(first, mask.key_length - behind) if some else range(0, 0)
        yield Tile(queries, keys, "mask" if hidden else "full")


def _attend_with_masks(request: Request, tiles: tuple[Tile, ...]) -> Tensor:
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


def _attend_tile(request: Request, tile: Tile, query: Tensor, bias: Tensor | None) -> Tensor:
    if not len(tile.keys):
        return _nothing_seen(query, request.value, query.shape[1])
    keys = slice(tile.keys.start, tile.keys.stop)
    # torch wants it in the dtype of the queries.
    mask = None if bias is None else bias[..., keys].to(query.dtype)
    blind = None
    if tile.pattern == "mask":
        allowed = request.mask.dense(tile.queries)[..., keys]
        # Kernels differ in what they give queries that see nothing, so these see all, and what they give is hidden.
        blind = ~allowed.any(-1, keepdim=True)
        allowed = allowed | blind
        mask = allowed if mask is None else torch.where(allowed, mask, float("-inf"))
    if mask is not None and request.sinks is not None:
        mask = F.pad(mask, (1, 0), value=mask.dtype == torch.bool)
    out = _sdpa(query, request.key[:, keys], request.value[:, keys], request, mask=mask, causal=False)
    return out if blind is None else out.masked_fill(blind.transpose(1, 2), 0.0)


def _attend_row(request: Request, rows: slice, tiles: tuple[Tile, ...]) -> Tensor:
    """The rows of a batch that share their tiles: [rows, S, h, Dv]."""
    query, key, value = request.query[rows], request.key[rows], request.value[rows]
    outputs, done = [], 0
    for tile in tiles:
        at, of = tile.queries, tile.keys
        if at.start > done:
            outputs.append(_nothing_seen(query, value, at.start - done))
        band = _band(request, at, of) if tile.pattern == "band" else None
        parts = query[:, at.start : at.stop], key[:, of.start : of.stop], value[:, of.start : of.stop]
        outputs.append(_sdpa(*parts, request, mask=band, causal=tile.pattern == "causal"))
        done = at.stop
    if query.shape[1] > done:
        outputs.append(_nothing_seen(query, value, query.shape[1] - done))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _nothing_seen(query: Tensor, value: Tensor, length: int) -> Tensor:
    return query.new_zeros(query.shape[0], length, query.shape[2], value.shape[3])


def _band(request: Request, queries: range, keys: range) -> Tensor:
    """Additive [queries, keys], with sinks [queries, 1 + keys]: 0 where a query sees a key, -inf elsewhere.

    Tiles of one shape share it. Additive from the start, since torch would make and save an additive copy of a bool
    mask for every tile.
    """
    like, mask = request.query, request.mask
    window, offset = mask.window, mask.offset + queries.start - keys.start
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
        if causal and key.shape[1] == query.shape[1] + 1:
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
    with torchs_choice("sdpa", kind, request):
        if causal and key.shape[2] > query.shape[2]:
            out = causal_after(query, key, value, dropout=request.dropout, scale=request.scale, grouped=grouped)
            return out.transpose(1, 2)[..., :value_size]
        out = F.scaled_dot_product_attention(
            query, key, value, mask, request.dropout, is_causal=causal, scale=request.scale, enable_gqa=grouped
        )
    return out.transpose(1, 2)[..., :value_size]
