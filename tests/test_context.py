"""One pass through a stack: parts of whole tensors, wholes of parts, and what is remembered of both."""

import torch
import torch.distributed as dist

from sp_attention.distributed.peers import Peers
from sp_attention.launch import run_ranks
from sp_attention.region.context import Context, StackPass
from sp_attention.region.sequence_dims import Along, Extent

EXTENT = Extent(2, 7)
WHOLE = torch.arange(42.0).view(2, 7, 3)
TOKENS, ROWS = Along(1), Along(0, rows=True)


def parts_and_wholes() -> list[int]:
    peers = Peers(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    call = StackPass(EXTENT, peers)
    span = call.span
    part = call.part(WHOLE, TOKENS)
    assert torch.equal(part, WHOLE[:, span.start : span.stop])
    assert call.is_part(part, TOKENS)
    assert not call.is_part(WHOLE, TOKENS)
    assert call.is_whole(WHOLE, TOKENS)
    assert torch.equal(call.whole(part, TOKENS), WHOLE)
    rows = call.part(WHOLE.flatten(0, 1), ROWS)
    assert torch.equal(call.whole(rows, ROWS), WHOLE.flatten(0, 1))
    assert call.mine == Extent(2, len(span))
    # What every layer is given is cut once, and found again without a collective.
    table = WHOLE.clone()
    kept = call.part(table, TOKENS, remember=True)
    assert call.part(table, TOKENS, remember=True) is kept
    assert call.whole(kept, TOKENS) is table
    assert call.original(kept) is table
    assert call.original(part) is part
    # With a gradient it is cut anew, since the graph may be freed in between.
    trained = WHOLE.clone().requires_grad_()
    assert call.part(trained, TOKENS, remember=True) is not call.part(trained, TOKENS, remember=True)
    assert not StackPass(Extent(2, 2), peers).is_shared
    assert StackPass(Extent(2, 3), peers).is_shared
    return [span.start, span.stop]


def test_parts_and_wholes() -> None:
    assert run_ranks(3, parts_and_wholes) == [[0, 3], [3, 5], [5, 7]]


def test_what_is_current_is_put_back_after_an_error() -> None:
    current = Context(None, weights=True)
    try:
        with current.set_to(Context(None, weights=False)):
            assert not current.weights
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert current.weights
