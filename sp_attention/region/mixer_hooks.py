"""Modules of a layer that mix tokens on their own: what they are given, and what of their results goes on.

Whole tensors, and my span of what they return; or my span, where the functions that mix in them share their work.
"""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from sp_attention.errors import UnsupportedError
from sp_attention.region.context import StackPass
from sp_attention.region.kv_cache import can_fill_from_spans
from sp_attention.region.layer_hooks import drawing, outside
from sp_attention.region.masks import DOCUMENTS
from sp_attention.region.plan import GatheredModule
from sp_attention.region.pytree import Path, leaves, map_leaves, tensors, text_of
from sp_attention.region.state import Around, RegionState


def around_gathered(state: RegionState, gathered: GatheredModule) -> Around:
    """Give whole tensors to a module of a layer that mixes tokens, and let my span of what it returns go on."""

    def around(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[Any, Any, Any]:
        stack_pass = state.context.stack_pass
        if stack_pass is None and not state.context.scope.is_known:
            raise UnsupportedError(outside(gathered.name))
        if stack_pass is None or not stack_pass.is_shared:
            with state.context.gathered(stack_pass if gathered.attends else None):
                yield None
            return None
        if _works_on_spans(gathered, stack_pass, (args, kwargs)):
            yield map_leaves(lambda path, leaf: _mine(path, leaf, gathered, stack_pass), (args, kwargs))
            return None
        given = map_leaves(lambda path, leaf: _whole(path, leaf, gathered, stack_pass), (args, kwargs))
        replicated = replace(stack_pass, is_replicated=True) if gathered.attends and stack_pass.fills_cache else None
        with drawing(state, stack_pass, gathered.name, alone=False), state.context.gathered(replicated):
            output = yield given

        def mine(path: Path, leaf: Any) -> Any:
            along = gathered.results.get(path)
            if along is None or not isinstance(leaf, Tensor) or not stack_pass.is_whole(leaf, along):
                return leaf
            return stack_pass.cut(leaf, along)

        return None if output is None else map_leaves(mine, output)

    return around


def _works_on_spans(gathered: GatheredModule, stack_pass: StackPass, given: Any) -> bool:
    """Whether a module's mixer functions share its work now: as rehearsed, and not of a sequence that goes on.

    Nor of single tokens, which mixers take for the next ones of a generation.
    """
    if not gathered.calls or stack_pass.extent.length < 2 * stack_pass.peers.size:
        return False
    if stack_pass.fills_cache:
        caches = [leaf for _, leaf in leaves(given) if isinstance(leaf, Cache)]
        indices = [getattr(one.module, "layer_idx", None) for one in gathered.calls]
        begins = all(can_fill_from_spans(cache, index) for cache in caches for index in indices)
        if not (gathered.fills_caches and caches and begins):
            return False
    return all(path in gathered.arguments or path[1] in DOCUMENTS for path, _ in tensors(given))


def _mine(path: Path, leaf: Any, gathered: GatheredModule, stack_pass: StackPass) -> Any:
    """What a module on my span is given in place of an argument that the layer has whole, such as a mask."""
    along = gathered.arguments.get(path)
    if along is None or not isinstance(leaf, Tensor) or stack_pass.is_span(leaf, along):
        return leaf
    return stack_pass.cut(leaf, along, remember=True) if stack_pass.is_whole(leaf, along) else leaf


def _whole(path: Path, leaf: Any, gathered: GatheredModule, stack_pass: StackPass) -> Any:
    """What a module on whole tensors is given in place of an argument."""
    if not isinstance(leaf, Tensor) or path[1] in DOCUMENTS:
        return leaf
    original = stack_pass.original(leaf)
    if original is not leaf:
        return original
    if path in gathered.arguments:
        along = gathered.arguments[path]
        return leaf if along is None or not stack_pass.is_span(leaf, along) else stack_pass.whole(leaf, along)
    if not {stack_pass.mine.length, stack_pass.extent.length}.isdisjoint(leaf.shape):
        raise UnsupportedError(
            f"{gathered.name}: the argument {text_of(path[1:])} {list(leaf.shape)} is not what enable() saw in its "
            "rehearsal"
        )
    return leaf
