"""The layers of a stack, on this rank's span of the sequence.

Before a layer, whatever still has the length of the whole sequence is cut to my span; after the last, the hidden states
are gathered, or stay sharded when the sharded loss follows.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sp_attention.distributed import rng
from sp_attention.errors import UnsupportedError
from sp_attention.kernels.request import Mask
from sp_attention.region.activation_checkpoint import ActivationCheckpoints, checkpoints_in
from sp_attention.region.context import Scope, StackPass
from sp_attention.region.extra_arguments import without_unread
from sp_attention.region.flags import ask_for_more
from sp_attention.region.kv_cache import LayersCache
from sp_attention.region.masks import Described
from sp_attention.region.plan import NEVER_CUT, Layer, Stack
from sp_attention.region.pytree import Path, leaf_at, leaves, map_leaves, tensors, text_of
from sp_attention.region.sequence_dims import Along, Extent
from sp_attention.region.state import Around, RegionState
from sp_attention.region.versions import CHECKPOINTING_ENABLE


def around_layer(state: RegionState, checkpoints: ActivationCheckpoints, stack: Stack, planned: Layer) -> Around:
    """Let a layer work on my span of the sequence."""
    inside = checkpoints_in(planned.module)
    is_last = planned is stack.layers[-1]

    def around(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[Any, Any, Any]:
        stack_pass, scope = _pass_of(state, stack, planned, (args, kwargs))
        # With whole tensors it is what it is in one process, whatever it is asked for.
        flags = {name: value for name, value in kwargs.items() if name not in scope.ignored}
        is_whole = (
            planned.name in stack_pass.gathered
            or ask_for_more(planned.flags, planned.names, args, flags)
            or _is_given_more(planned, stack_pass, scope, (args, kwargs))
        )
        layer = replace(planned, gathered=True) if is_whole else planned

        given = map_leaves(partial(_given_to, state, layer, stack_pass, scope), (args, kwargs))
        alone = stack_pass.is_shared and not layer.gathered and not layer.draws_alike
        mlp_tiles = 1 if is_whole else stack_pass.mlp_tiles
        with (
            drawing(state, stack_pass, layer.name, alone),
            state.context.layer(_pass_within(stack_pass, planned, is_whole), mlp_tiles, scope),
        ):
            if state.forward is not None and stack_pass.is_shared:
                state.forward.note(leaf_at(given, layer.hidden), layer.arguments[layer.hidden], stack_pass)
            offloads_from = state.plan.models[0].device.type if state.plan.offloads else None
            again = inside if module is layer.module else checkpoints_in(module)
            runs_again = checkpoints.bind(module, again, offloads_from)
            if offloads_from is not None and not runs_again and module.training and torch.is_grad_enabled():
                raise UnsupportedError(
                    f"offload=True, and nothing checkpoints {layer.name}, so nothing of it can be kept in CPU memory: "
                    f"call model.{CHECKPOINTING_ENABLE}() before you train, or leave offload out"
                )
            try:
                output = yield given
            finally:
                checkpoints.unbind()
        if is_last and state.forward is not None:
            state.forward.inside.discard(stack.name)
        if output is None:
            return None
        ends = is_last or stack_pass.is_separate
        require_undrawn(stack_pass.states if ends else None, state.plan.models[0].device)
        if not stack_pass.is_shared:
            return map_leaves(lambda _, leaf: users_own(leaf), output)
        _look_at(state, layer, stack_pass, given, output)
        gathers = ends and not stack_pass.stays_sharded
        return map_leaves(lambda path, leaf: leaving(path, leaf, layer, stack_pass, gathers), output)

    return around


def _look_at(state: RegionState, layer: Layer, stack_pass: StackPass, given: Any, output: Any) -> None:
    """What a forward wants of what a layer was given and returned: records, and whether its length changes anything."""
    if state.forward is None:
        return
    if state.length_check is not None and not layer.gathered:
        state.length_check.passed(layer, leaf_at(given, layer.hidden), stack_pass, state.context)
    for path, tensor in tensors(output):
        state.forward.note(tensor, layer.results.get(path), stack_pass)


def _pass_of(state: RegionState, stack: Stack, layer: Layer, given: Any) -> tuple[StackPass, Scope]:
    """The pass that a call of a layer belongs to, new for the first layer, and its model's scope."""
    mask = next((leaf.mask for _, leaf in leaves(given) if isinstance(leaf, Described)), None)
    forward = state.forward
    if forward is None:
        return _pass_again(state, layer, stack, mask)
    # Whatever the model does with hidden states that it collects, it does with whole ones.
    is_separate = stack.separate or not forward.as_rehearsed or stack.name in forward.others.separate
    if layer is stack.layers[0] or is_separate:
        stack_pass = forward.latest[stack.name] = _new_pass(state, stack, layer, given, is_separate)
        if not is_separate:
            forward.inside.add(stack.name)
    elif stack.name in forward.inside:
        stack_pass = forward.latest[stack.name]
    else:
        raise UnsupportedError(
            f"{layer.name} is called before the first layer of its stack, unlike in the rehearsal of enable(): a "
            "model that skips layers is not covered"
        )
    if mask is not None and forward.has_gradients:
        stack_pass.pending.add(layer.name)
        state.passes.note(mask, stack.name, stack_pass, state.context.scope)
    return stack_pass, state.context.scope


def _new_pass(state: RegionState, stack: Stack, layer: Layer, given: Any, is_separate: bool) -> StackPass:
    """The pass that a layer begins."""
    forward, hidden, along = state.forward, leaf_at(given, layer.hidden), layer.arguments[layer.hidden]
    assert forward is not None
    assert along is not None
    extent = Extent(hidden.shape[along.dim - 1 if along.dim else 1], hidden.shape[along.dim])
    is_before_loss = stack.name == state.plan.before_loss and forward.stays_sharded == extent.length
    forward.passes += 1
    stack_pass = StackPass(
        extent,
        state.peers,
        fills_cache=forward.fills_caches and any(isinstance(leaf, Cache) for _, leaf in leaves(given)),
        is_separate=is_separate,
        stays_sharded=is_before_loss and not is_separate,
        mlp_tiles=(forward.tile_counts or state.tile_counts(extent.batch, extent.length))[0],
        seed=rng.derived(forward.seed, forward.passes) if forward.seed else None,
        states=rng.states(forward.model.device) if forward.may_draw_outside else None,
        gathered=forward.others.gathered,
    )
    if stack.embedding is not None and forward.embedded is not None:
        looked_up, forward.embedded = forward.embedded, None
        if hidden.requires_grad and torch.is_grad_enabled():
            looked_up.span.requires_grad_()
        if not looked_up.is_whole(hidden) or looked_up.span.requires_grad > torch.is_grad_enabled():
            raise UnsupportedError(
                f"{layer.name} is not given what {stack.embedding.name} looked up, unlike in the rehearsal of "
                "enable(), or is checkpointed by other code than transformers': call enable() after whatever "
                "changed the model"
            )
        stack_pass.embedded = looked_up
    return stack_pass


def _pass_within(stack_pass: StackPass, planned: Layer, is_whole: bool) -> StackPass | None:
    """The pass that what is in a layer belongs to; None where it is on whole tensors."""
    if is_whole:
        return replace(stack_pass, is_replicated=True) if stack_pass.fills_cache else None
    # What is not cut has caches alone to look after.
    belongs = not planned.gathered and (stack_pass.is_shared or stack_pass.fills_cache)
    return stack_pass if belongs else None


def _pass_again(state: RegionState, layer: Layer, stack: Stack, mask: Mask | None) -> tuple[StackPass, Scope]:
    """The pass of a layer that a checkpoint around its hooks recomputes in backward: found by its mask."""
    noted = [] if mask is None else state.passes.find(mask, stack.name)
    if len(noted) > 1:
        raise UnsupportedError(
            f"{layer.name} is run again in backward, and its mask was given to several forwards that drew other random "
            "numbers, or made other use of the logits: give each forward a mask of its own, or use "
            f"model.{CHECKPOINTING_ENABLE}()"
        )
    if not noted or (noted[0][0].is_separate and noted[0][0].seed is not None):
        raise UnsupportedError(outside(layer.name))
    stack_pass, scope = noted[0]
    stack_pass.pending.discard(layer.name)
    return stack_pass, scope


def drawing(state: RegionState, stack_pass: StackPass, name: str, alone: bool) -> AbstractContextManager[None]:
    """Within it a layer or a module draws random numbers of this rank alone, or those that all ranks draw."""
    if stack_pass.seed is None:
        return nullcontext()
    shared = rng.derived(stack_pass.seed, name)
    seed = rng.derived(stack_pass.seed, name, state.peers.rank) if alone else shared
    return rng.Forked(seed, state.plan.models[0].device, shared)


def require_undrawn(before: list[Tensor] | None, device: torch.device) -> None:
    """Raise UnsupportedError, on every rank alike, if random numbers were drawn since generators had these states."""
    if before is not None and not rng.are_equal(rng.states(device), before):
        raise UnsupportedError(
            "random numbers were drawn in training, unlike in the rehearsal of enable(): switch dropout on before "
            "enable()"
        )


def _given_to(state: RegionState, layer: Layer, stack_pass: StackPass, scope: Scope, path: Path, leaf: Any) -> Any:
    """What a layer is given in place of an argument."""
    if isinstance(leaf, Cache):
        return LayersCache(leaf, layer.heads, state.context, state.peers) if stack_pass.fills_cache else None
    if path[1] in scope.ignored:
        return without_unread(leaf, str(path[1]), stack_pass.extent.length)
    return entering(path, leaf, layer, stack_pass)


def _is_given_more(layer: Layer, stack_pass: StackPass, scope: Scope, given: Any) -> bool:
    """Whether a layer is given tensors of the sequence that it was not in the rehearsal, and which nothing can cut."""
    if not stack_pass.is_shared:
        return False
    return any(
        stack_pass.extent.length in leaf.shape and not _are_positions(path, leaf, stack_pass)
        for path, leaf in tensors(given)
        if not (path in layer.arguments or path in layer.masks or path[1] in NEVER_CUT or path[1] in scope.ignored)
    )


def _are_positions(path: Path, leaf: Tensor, stack_pass: StackPass) -> bool:
    return path[-1] == "position_ids" and leaf.shape[-1] == stack_pass.extent.length


def entering(path: Path, leaf: Any, layer: Layer, stack_pass: StackPass) -> Any:
    """What a layer is given in place of an argument: my span of it, or all of it where the layer is gathered."""
    if not isinstance(leaf, Tensor):
        return leaf
    if stack_pass.embedded is not None and stack_pass.embedded.is_whole(leaf):
        span = stack_pass.embedded.span
        return stack_pass.whole(span, Along(1)) if layer.gathered else span
    if not stack_pass.is_shared or path[1] in NEVER_CUT or path in layer.masks:
        return leaf
    if path not in layer.arguments:
        if layer.gathered or not _are_positions(path, leaf, stack_pass):
            return leaf
        # Some models hand these on only if they are given them in a shape of their own, as by generate().
        return stack_pass.cut(leaf, Along(leaf.dim() - 1), remember=True)
    along = layer.arguments[path]
    if along is None:
        return leaf
    if path in layer.handed and not stack_pass.is_separate and stack_pass.is_span(leaf, along):
        return stack_pass.whole(leaf, along) if layer.gathered else leaf
    if leaf.shape[along.dim] == 1:  # The same for all tokens; a span of one token looks alike, and is handed on.
        return leaf
    if stack_pass.is_whole(leaf, along):
        return leaf if layer.gathered else stack_pass.cut(leaf, along, remember=path not in layer.handed)
    if stack_pass.fills_cache:
        # Of the tokens in the cache too: whoever attends to those is given what is about them.
        return stack_pass.cut_after(leaf, along) if layer.takes_last and not layer.gathered else leaf
    raise UnsupportedError(_unlike_rehearsed(path, leaf, layer.name, stack_pass))


def leaving(path: Path, leaf: Any, layer: Layer, stack_pass: StackPass, ends: bool) -> Any:
    """What goes on in place of a layer's result: my span to the next layer, all of it to what is outside."""
    along = layer.results.get(path)
    if along is None or not isinstance(leaf, Tensor):
        if isinstance(leaf, Tensor) and path not in layer.results and not layer.gathered:
            _require_whole(path, leaf, layer.name, stack_pass)
        return users_own(leaf)
    stays = path in layer.hands and not ends
    if layer.gathered:
        return stack_pass.cut(leaf, along) if stays and stack_pass.is_whole(leaf, along) else leaf
    return leaf if stays or not stack_pass.is_span(leaf, along) else stack_pass.whole(leaf, along)


def _require_whole(path: Path, leaf: Tensor, name: str, stack_pass: StackPass) -> None:
    """Raise UnsupportedError, on every rank, for a result that was not rehearsed, unless it is weights [.., S, S]."""
    if list(leaf.shape[-2:]) != [stack_pass.extent.length] * 2:
        raise UnsupportedError(
            f"{name}: the result {'.'.join(map(str, path)) or 'of this layer'} {list(leaf.shape)} was not there in the "
            "rehearsal of enable(), and is of a part of the sequence, so nothing tells how it becomes whole: call "
            "enable() after you switch on whatever lets the layer return it, or do this within handle.suspended()"
        )


def users_own(leaf: Any) -> Any:
    """The user's cache in place of what stood for it in a layer; anything else as it is."""
    return leaf.cache if type(leaf) is LayersCache else leaf


def _unlike_rehearsed(path: Path, leaf: Tensor, name: str, stack_pass: StackPass) -> str:
    return (
        f"{name}: the argument {text_of(path[1:])} {list(leaf.shape)} is not what enable() saw in its rehearsal; it is "
        f"not of {stack_pass.extent.length} tokens and cannot be cut"
    )


def outside(name: str) -> str:
    if not torch.is_grad_enabled():  # A checkpoint that recomputes in backward needs gradients.
        return (
            f"{name} is called outside of a forward of its model, as generate() calls an encoder, and nothing tells "
            "what sequence it is of: do this within handle.suspended(), by the whole model on every rank"
        )
    return (
        f"{name} runs outside of a forward of its model, and nothing tells what sequence it is of: to checkpoint it "
        f"use model.{CHECKPOINTING_ENABLE}()"
    )
