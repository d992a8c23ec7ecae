"""A mask as sequences of various lengths, end to end, for kernels that take such.

A run of queries whose intervals move in one way (`intervals`) is a sequence, which a kernel does without knowing
anything of padding or documents:

    the end moves on, the start stays or keeps its distance    causal, with a window
    neither moves                                              all queries see all keys
    the start moves on, the end stays                          causal, with queries and keys in reverse order
    both move on, at less distance than the window             causal, with a narrower window

The last query of a sequence stands beside its last key, so a query may see keys before all queries. Queries that see
nothing are in no sequence.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention.kernels.intervals import JUMPS, SHRINKS, SLIDES, STAYS, has_intervals, runs, widest
from sp_attention.kernels.request import Mask


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
class Calls:
    """A mask as calls, each of sequences of one pattern.

    places: int64 [B * Sq]: where each query's output is among those of all calls, one after the other; behind the last
        for queries that see nothing. None where it is in its place.
    """

    sequences: tuple[Sequences, ...]
    places: Tensor | None


def whole(mask: Mask) -> tuple[Pattern, int] | None:
    """The pattern that every row of a mask has as a whole, and how many of its keys take part; None if none has."""
    if mask.documents is not None or mask.padding is not None or not has_intervals(mask):
        return None
    length, end = mask.key_length, mask.offset + mask.query_length
    if not mask.causal and mask.window is None:
        return Pattern(), length
    if mask.causal:
        return (_causal(mask.window), end) if end <= length else None
    assert mask.window is not None
    return (Pattern(False, mask.window - 1, mask.window - 1), length) if end == length else None


def calls(mask: Mask, sequences: float = inf, tokens: float = inf) -> Calls:
    """The calls that do a mask which `has_intervals`; computed on the host, the result is on the mask's device.

    sequences, tokens: how many of these a call takes at most; a sequence of more tokens is a call of its own.
    """
    found, real = runs(mask)
    parts: dict[Pattern, list[_Part]] = {}
    for run in found:
        queries, keys = torch.arange(run.queries.start, run.queries.stop), real[run.keys.start : run.keys.stop]
        if run.kind == SHRINKS:
            queries, keys = queries.flip(0), keys.flip(0)
        # One query alone sees all its keys in any pattern: in the one that there is anyway.
        everything = run.kind == STAYS or (run.kind == JUMPS and not mask.causal and mask.window is None)
        window = run.first if run.kind == SLIDES else widest(mask)
        parts.setdefault(Pattern() if everything else _causal(window), []).append((queries, keys))
    total = mask.batch * mask.query_length
    order = torch.cat([torch.empty(0, dtype=torch.int64), *(queries for some in parts.values() for queries, _ in some)])
    batches = ((pattern, some) for pattern, many in parts.items() for some in _batches(many, sequences, tokens))
    each = tuple(_sequences(pattern, some, mask) for pattern, some in batches)
    if torch.equal(order, torch.arange(total)):
        return Calls(each, None)
    places = torch.full((total,), len(order)).scatter_(0, order, torch.arange(len(order)))
    return Calls(each, places.to(mask.device))


def attend(
    calls: Calls,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Callable[[Tensor, Tensor, Tensor, Sequences], Tensor],
) -> Tensor:
    """[B, Sq, h, D], [B, Sk, hkv, D], [B, Sk, hkv, Dv] → [B, Sq, h, Dv], zeros for queries that see nothing.

    call: the kernel, given the [T, h, D] tensors of some sequences and these.
    """
    outputs = [
        call(_taken(query, one.queries), _taken(key, one.keys), _taken(value, one.keys), one) for one in calls.sequences
    ]
    if calls.places is not None:
        outputs.append(query.new_zeros(1, query.shape[2], value.shape[3]))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    out = out if calls.places is None else out.index_select(0, calls.places)
    return out.reshape(*query.shape[:2], *out.shape[1:])


def _taken(tensor: Tensor, index: Tensor | None) -> Tensor:
    """[B, S, h, D] → [T, h, D]."""
    flat = tensor.flatten(0, 1)
    return flat if index is None else flat.index_select(0, index)


def _causal(window: int | None) -> Pattern:
    return Pattern(True) if window is None else Pattern(True, window - 1, 0)


# A sequence: which queries and keys it has.
_Part = tuple[Tensor, Tensor]


def _batches(parts: list[_Part], sequences: float, tokens: float) -> Iterator[list[_Part]]:
    """The sequences in groups that one call takes."""
    batch: list[_Part] = []
    size = 0
    for part in parts:
        more = max(map(len, part))
        if batch and (len(batch) == sequences or size + more > tokens):
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += more
    yield batch


def _sequences(pattern: Pattern, parts: list[_Part], mask: Mask) -> Sequences:
    queries, keys = (torch.cat(some) for some in zip(*parts, strict=True))
    lengths = torch.tensor([[len(some) for some in part] for part in parts])
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
