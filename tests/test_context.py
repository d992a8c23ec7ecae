"""A pass through a stack: spans of whole tensors, wholes of spans, what is remembered of both; and scopes."""

import weakref

import pytest
import torch
import torch.distributed as dist

from sp_attention.distributed.peers import Peers
from sp_attention.kernels.request import Mask
from sp_attention.launch import run_ranks
from sp_attention.region.context import Context, PassesOfMasks, Scope, StackPass
from sp_attention.region.sequence_dims import Along, Extent

EXTENT = Extent(2, 7)
WHOLE = torch.arange(42.0).view(2, 7, 3)
HEADS = torch.arange(6.0)
TOKENS, ROWS = Along(1), Along(0, rows=True)


def spans_and_wholes() -> list[int]:
    peers = Peers(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    stack_pass = StackPass(EXTENT, peers)
    span = stack_pass.span
    cut = stack_pass.cut(WHOLE, TOKENS)
    assert torch.equal(cut, WHOLE[:, span.start : span.stop])
    assert stack_pass.is_span(cut, TOKENS)
    assert not stack_pass.is_span(WHOLE, TOKENS)
    assert stack_pass.is_whole(WHOLE, TOKENS)
    assert torch.equal(stack_pass.whole(cut, TOKENS), WHOLE)
    rows = stack_pass.cut(WHOLE.flatten(0, 1), ROWS)
    assert torch.equal(stack_pass.whole(rows, ROWS), WHOLE.flatten(0, 1))
    assert stack_pass.mine == Extent(2, len(span))
    # What every layer is given is cut once, and found again without a collective.
    table = WHOLE.clone()
    kept = stack_pass.cut(table, TOKENS, remember=True)
    assert stack_pass.cut(table, TOKENS, remember=True) is kept
    assert stack_pass.whole(kept, TOKENS) is table
    assert stack_pass.original(kept) is table
    assert stack_pass.original(cut) is cut
    # With a gradient it is cut anew, since the graph may be freed in between.
    trained = WHOLE.clone().requires_grad_()
    assert stack_pass.cut(trained, TOKENS, remember=True) is not stack_pass.cut(trained, TOKENS, remember=True)
    assert not StackPass(Extent(2, 2), peers).is_shared
    assert StackPass(Extent(2, 3), peers).is_shared
    return [span.start, span.stop]


def test_spans_and_wholes() -> None:
    assert run_ranks(3, spans_and_wholes) == [[0, 3], [3, 5], [5, 7]]


def test_each_transition_goes_back_to_the_scope_before_it_after_an_error_too() -> None:
    context, stack_pass = Context(), StackPass(EXTENT, Peers(None, 0, 2))
    with context.model([WHOLE], weights=True):
        of_the_model = context.scope
        assert of_the_model.is_known
        assert of_the_model.weights
        with context.inner_model([HEADS]):
            assert WHOLE in context.scope.given
            assert HEADS in context.scope.given
        with context.layer(stack_pass, 3):
            assert (context.stack_pass, context.scope.mlp_tiles, context.scope.weights) == (stack_pass, 3, True)
            with pytest.raises(KeyboardInterrupt), context.gathered():
                raise KeyboardInterrupt
            assert context.stack_pass is stack_pass
        assert context.scope is of_the_model
        assert HEADS not in context.scope.given
    assert not context.scope.is_known
    with context.recomputation(of_the_model):
        assert context.scope is of_the_model
    assert not context.scope.is_known


def test_tensors_of_a_scope_are_not_kept_alive_nor_taken_for_others() -> None:
    context, keys = Context(), torch.zeros(2)
    context.keep(keys, 4)
    assert context.heads_kept(keys) == 4
    assert context.heads_kept(keys.clone()) is None
    held = weakref.ref(keys)
    with context.model([keys], weights=False):
        del keys
        assert held() is None
        assert not len(context.scope.given)


def test_a_mask_finds_the_pass_that_it_was_given_in() -> None:
    mask, scope = Mask(2, 7, 7, torch.device("cpu")), Scope(weights=True)
    passes, peers = PassesOfMasks(), Peers(None, 0, 2)
    assert passes.find(mask, "layers") == []
    first, again, other = (StackPass(EXTENT, peers, seed=seed, pending={"0", "1"}) for seed in (1, 1, 2))
    passes.note(mask, "layers", first, scope)
    passes.note(mask, "layers", first, scope)
    assert passes.find(mask, "layers") == [(first, scope)]
    assert passes.find(mask, "others") == []
    # Either runs again in the same way, so the latest will do.
    passes.note(mask, "layers", again, scope)
    assert passes.find(mask, "layers") == [(again, scope)]
    # Of these two it is not known which of them a layer runs again in.
    passes.note(mask, "layers", other, scope)
    assert passes.find(mask, "layers") == [(again, scope), (other, scope)]
    # One that has run again as a whole is not looked for any more.
    again.pending.clear()
    passes.note(mask, "layers", other, scope)
    assert passes.find(mask, "layers") == [(other, scope)]
