"""What goes into a layer and comes out of it, in place of what was given and returned: my span of it, or all of it."""

from typing import Any

from torch import Tensor

from sp_attention.errors import UnsupportedError
from sp_attention.region.context import StackPass
from sp_attention.region.kv_cache import LayersCache
from sp_attention.region.plan import NEVER_CUT, Layer
from sp_attention.region.pytree import Path
from sp_attention.region.sequence_dims import Along


def entering(path: Path, leaf: Any, layer: Layer, call: StackPass) -> Any:
    """What a layer is given in place of an argument: my span of it, or all of it where the layer is gathered."""
    if isinstance(leaf, Tensor) and call.embedded is not None and call.embedded.is_whole(leaf):
        return call.embedded.part
    if not isinstance(leaf, Tensor) or not call.is_shared or path[1] in NEVER_CUT or path in layer.masks:
        return leaf
    if path not in layer.arguments:
        if layer.gathered or call.extent.length not in leaf.shape:
            return leaf
        if path[-1] == "position_ids" and leaf.shape[-1] == call.extent.length:
            # Some models hand these on only if they are given them in a shape of their own, as by generate().
            return call.part(leaf, Along(leaf.dim() - 1), remember=True)
    else:
        along = layer.arguments[path]
        if along is None or leaf.shape[along.dim] == 1:
            return leaf
        if path in layer.handed and not call.is_separate and call.is_part(leaf, along):
            return call.whole(leaf, along) if layer.gathered else leaf
        if call.is_whole(leaf, along):
            return leaf if layer.gathered else call.part(leaf, along, remember=path not in layer.handed)
        if call.fills:
            # Of the tokens in the cache too: whoever attends to those is given what is about them.
            return call.until_mine(leaf, along) if layer.takes_last and not layer.gathered else leaf
    raise UnsupportedError(
        f"{layer.name}: the argument {text_of(path)} {list(leaf.shape)} is not what enable() saw in its rehearsal; it "
        f"is not of {call.extent.length} tokens and cannot be cut"
    )


def leaving(path: Path, leaf: Any, layer: Layer, call: StackPass, ends: bool) -> Any:
    """What goes on in place of a layer's result: my span to the next layer, all of it to what is outside."""
    along = layer.results.get(path)
    if along is None or not isinstance(leaf, Tensor):
        return users_own(leaf)
    stays = path in layer.hands and not ends
    if layer.gathered:
        return call.part(leaf, along) if stays and call.is_whole(leaf, along) else leaf
    return leaf if stays or not call.is_part(leaf, along) else call.whole(leaf, along)


def users_own(leaf: Any) -> Any:
    """The user's cache in place of what stood for it in a layer; anything else as it is."""
    return leaf.cache if type(leaf) is LayersCache else leaf


def text_of(path: Path) -> str:
    return ".".join(map(str, path[1:]))
