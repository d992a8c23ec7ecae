"""The layers of a stack, on this rank's span of the sequence.

Before a layer, whatever still has the length of the whole sequence is cut to my span; after the last, the hidden states
are gathered, or stay sharded when the sharded loss follows. A part of a layer that mixes tokens on its own is given
whole tensors, and my span of what it returns goes on.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sp_attention.distributed import rng
from sp_attention.errors import UnsupportedError
from sp_attention.kernels.request import Mask
from sp_attention.region.activation_checkpoint import ActivationCheckpoints, checkpoints_in
from sp_attention.region.context import StackPass
from sp_attention.region.crossing import entering, leaving, text_of, users_own
from sp_attention.region.kv_cache import LayersCache
from sp_attention.region.masks import DOCUMENTS, Described
from sp_attention.region.plan import Layer, Part, Stack
from sp_attention.region.pytree import Path, leaf_at, leaves, map_leaves, tensors
from sp_attention.region.sequence_dims import Extent
from sp_attention.region.state import Hook, RegionState


def layer_hooks(
    running: RegionState, checkpoints: ActivationCheckpoints, stack: Stack, layer: Layer
) -> tuple[Hook, Hook]:
    """Let a layer work on my span of the sequence."""
    inside = checkpoints_in(layer.module)
    entered: list[tuple[StackPass, StackPass | None, int, Callable[[], None]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _call_of(running, stack, layer, (args, kwargs))

        def given_instead(path: Path, leaf: Any) -> Any:
            if isinstance(leaf, Cache):
                return LayersCache(leaf, layer.heads, running.current, running.peers) if call.fills else None
            return entering(path, leaf, layer, call)

        given = map_leaves(given_instead, (args, kwargs))
        mine = call.is_shared and not layer.gathered
        entered.append((call, running.current.call, running.current.pieces, _drawing(running, call, layer.name, mine)))
        running.current.pieces = call.pieces
        running.current.call = call if mine or (call.fills and not layer.gathered) else None
        if running.forward is not None and running.forward.records and call.is_shared:
            running.forward.note(leaf_at(given, layer.hidden), layer.arguments[layer.hidden], call)
        offloads_from = running.region.models[0].device.type if running.region.offloads else None
        runs_again = checkpoints.bind(inside, offloads_from)
        if running.region.offloads and not runs_again and module.training and torch.is_grad_enabled():
            raise UnsupportedError(
                f"offload=True, and nothing checkpoints {layer.name}, so nothing of it can be kept in CPU memory: "
                "call model.gradient_checkpointing_enable() before you train, or leave offload out"
            )
        return given

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        checkpoints.unbind()
        if not entered:
            return None  # An error before this layer began.
        call, running.current.call, running.current.pieces, restore = entered.pop()
        restore()
        is_last = layer is stack.layers[-1]
        if is_last and running.forward is not None:
            running.forward.inside.discard(stack.name)
        if output is None:
            return None
        if not call.is_shared:
            return map_leaves(lambda _, leaf: users_own(leaf), output)
        if running.forward is not None and running.forward.records:
            for path, tensor in tensors(output):
                running.forward.note(tensor, layer.results.get(path), call)
        ends = call.is_separate or (is_last and not call.stays_sharded)
        return map_leaves(lambda path, leaf: leaving(path, leaf, layer, call, ends), output)

    return before, after


def _call_of(running: RegionState, stack: Stack, layer: Layer, given: Any) -> StackPass:
    """The call that a layer belongs to; it is new for the first, and for each where they are separate."""
    mask = next((leaf.mask for _, leaf in leaves(given) if isinstance(leaf, Described)), None)
    if running.forward is None:
        return _call_again(running, layer, stack, mask)
    hidden, along = leaf_at(given, layer.hidden), layer.arguments[layer.hidden]
    assert along is not None
    # Whatever the model does with hidden states that it collects, it does with whole ones.
    is_separate = stack.separate or not running.forward.as_rehearsed
    call = running.forward.calls.get(stack.name)
    if layer is stack.layers[0] or is_separate:
        extent = Extent(hidden.shape[along.dim - 1 if along.dim else 1], hidden.shape[along.dim])
        running.forward.passes += 1
        call = StackPass(
            extent,
            running.peers,
            fills=running.forward.caches and any(isinstance(leaf, Cache) for _, leaf in leaves(given)),
            is_separate=is_separate,
            stays_sharded=not is_separate
            and stack.name == running.region.before_loss
            and running.forward.stays_sharded == extent.length,
            pieces=(running.forward.counts or running.counts(extent.batch, extent.length))[0],
            seed=rng.derived(running.forward.seed, running.forward.passes) if running.forward.seed else None,
        )
        if stack.embedding is not None and running.forward.embedded is not None:
            call.embedded, running.forward.embedded = running.forward.embedded, None
            if hidden.requires_grad and torch.is_grad_enabled():
                call.embedded.part.requires_grad_()
            if not call.embedded.is_whole(hidden) or call.embedded.part.requires_grad > torch.is_grad_enabled():
                raise UnsupportedError(
                    f"{layer.name} is not given what {stack.embedding.name} looked up, unlike in the rehearsal of "
                    "enable(), or is checkpointed by other code than transformers': call enable() after whatever "
                    "changed the model"
                )
        running.forward.calls[stack.name] = call
        if not is_separate:
            running.forward.inside.add(stack.name)
    if call is None or not (is_separate or stack.name in running.forward.inside):
        raise UnsupportedError(
            f"{layer.name} is called before the first layer of its stack, unlike in the rehearsal of enable(): a "
            "model that skips layers is not covered"
        )
    if mask is not None:
        mask.once(("call", stack.name), lambda: call)
    return call


def _call_again(running: RegionState, layer: Layer, stack: Stack, mask: Mask | None) -> StackPass:
    """The call of a layer that a checkpoint around its hooks recomputes in backward: the mask remembers it."""
    call = None if mask is None else mask.once(("call", stack.name), lambda: None)
    if call is None or (call.is_separate and call.seed is not None):
        raise UnsupportedError(_outside(layer.name))
    return call


def _drawing(running: RegionState, call: StackPass, name: str, mine: bool) -> Callable[[], None]:
    """Let a layer or a part draw random numbers of its own, or those that all ranks draw; returns what ends it."""
    if call.seed is None:
        return lambda: None
    seed = rng.derived(call.seed, name, *([running.peers.rank] if mine else []))
    return rng.forked(seed, running.region.models[0].device)


def part_hooks(running: RegionState, part: Part) -> tuple[Hook, Hook]:
    """Give whole tensors to a part of a layer that mixes tokens, and let my span of what it returns go on."""
    entered: list[tuple[StackPass | None, Callable[[], None]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = running.current.call
        if call is None and not running.current.is_known:
            raise UnsupportedError(_outside(part.name))
        if call is None or not call.is_shared:
            entered.append((call, lambda: None))
            running.current.call = call if part.attends else None
            return None

        def whole(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or path[1] in DOCUMENTS:
                return leaf
            if call.original(leaf) is not leaf:
                return call.original(leaf)
            if path not in part.arguments and not {call.mine.length, call.extent.length}.isdisjoint(leaf.shape):
                raise UnsupportedError(
                    f"{part.name}: the argument {text_of(path)} {list(leaf.shape)} is not what enable() saw in its "
                    "rehearsal"
                )
            along = part.arguments.get(path)
            return leaf if along is None or not call.is_part(leaf, along) else call.whole(leaf, along)

        given = map_leaves(whole, (args, kwargs))
        entered.append((call, _drawing(running, call, part.name, mine=False)))
        running.current.call = replace(call, is_replicated=True) if part.attends and call.fills else None
        return given

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not entered:
            return None
        call, restore = entered.pop()
        running.current.call = call
        restore()
        if output is None or call is None or not call.is_shared:
            return None

        def mine(path: Path, leaf: Any) -> Any:
            along = part.results.get(path)
            if along is None or not isinstance(leaf, Tensor) or not call.is_whole(leaf, along):
                return leaf
            return call.part(leaf, along)

        return map_leaves(mine, output)

    return before, after


def _outside(name: str) -> str:
    if not torch.is_grad_enabled():  # A checkpoint that recomputes in backward needs gradients.
        return (
            f"{name} is called outside of a forward of its model, as generate() calls an encoder, and nothing tells "
            "what sequence it is of: do this within handle.suspended(), by the whole model on every rank"
        )
    return (
        f"{name} runs outside of a forward of its model, and nothing tells what sequence it is of: to checkpoint it "
        "use model.gradient_checkpointing_enable()"
    )
