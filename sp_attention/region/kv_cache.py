"""Key/value caches of which each rank keeps its heads: what a layer is given in place of the user's cache.

The user holds transformers' own cache, and what it does with rows and lengths it does with the heads that are in it. A
cache that has been filled so is marked, and is of no use to a model that is not enabled: it says so when one fills it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, QuantizedCache, StaticLayer

from sp_attention.distributed.peers import Peers
from sp_attention.errors import UnsupportedError
from sp_attention.mixers.halo import last_columns
from sp_attention.region.context import Context
from sp_attention.region.pytree import tensors
from sp_attention.region.sequence_dims import Along
from sp_attention.ulysses.all_to_all import to_heads
from sp_attention.ulysses.head_plan import head_plan

# The attribute of a layer of a cache that says which heads are in it. It goes along with copies of the cache.
_MARK = "_sp_attention_heads"

# Query heads by kind of attention: whether the keys are another sequence's, and the number of key heads. 0 where each
# rank keeps all heads.
HeadCounts = Mapping[tuple[bool, int], int]


@dataclass(frozen=True)
class _Held:
    """Which heads each rank holds in a layer of a cache, and which of the ranks this is."""

    stored: tuple[range, ...]
    rank: int

    @property
    def mine(self) -> range:
        return self.stored[self.rank]

    @property
    def all_heads(self) -> int:
        return self.stored[-1].stop


class LayersCache:
    """A user's cache as a layer of the model sees it.

    `update` keeps the keys and values of this rank's heads, over the whole sequence, and returns those of all that is
    cached; `context` learns that they are of these heads. Keys that are not of the attention's heads, such as the
    latents of multi-head latent attention, are kept whole on every rank, and so is all that is no key and value, such
    as the end of a convolution's input, which `update_conv_state` is given spans of. In what is given whole tensors it
    is the user's cache as it is. Anything else is answered by the user's cache.

    heads: how many heads attend to how many in this layer. cross_attention: it is for keys of another sequence.
    """

    __slots__ = ("__weakref__", "_cache", "_context", "_heads", "_over_memory", "_peers")
    _cache: Any  # a Cache, or one of encoders and decoders, whose own attributes are asked for
    _context: Context
    _heads: HeadCounts
    _over_memory: bool
    _peers: Peers

    def __init__(
        self, cache: Cache, heads: HeadCounts, context: Context, peers: Peers, cross_attention: bool | None = None
    ):
        own = {
            "_cache": cache,
            "_heads": heads,
            "_context": context,
            "_peers": peers,
            "_over_memory": {over for over, _ in heads} == {True} if cross_attention is None else cross_attention,
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cache, name, value)

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def cache(self) -> Cache:
        """The user's."""
        cache: Cache = self._cache
        return cache

    @property
    def layers(self) -> "_Layers":
        return _Layers(self._cache.layers, self._context)

    @property
    def self_attention_cache(self) -> "LayersCache":
        return self._of(self._cache.self_attention_cache, cross_attention=False)

    @property
    def cross_attention_cache(self) -> "LayersCache":
        return self._of(self._cache.cross_attention_cache, cross_attention=True)

    def _of(self, cache: Cache, cross_attention: bool) -> "LayersCache":
        return LayersCache(cache, self._heads, self._context, self._peers, cross_attention)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """keys [B, Hkv, s | S, D], values [B, Hkv, s | S, Dv] → those of my heads, of all that is cached."""
        cache, stack_pass, peers = self._cache, self._context.stack_pass, self._peers
        keep: Callable[..., tuple[Tensor, Tensor]] = type(cache).update  # Not `_refuse`, which stands in its place.
        if stack_pass is None:
            return keep(cache, keys, values, layer_idx, *args, **kwargs)
        exchanged = stack_pass.is_shared and not self._over_memory
        # Numbers are quantised together with those of other heads, so a quantised cache has all of them.
        quantised = isinstance(cache, QuantizedCache)
        queries = 0 if quantised else self._heads.get((self._over_memory, keys.shape[1]))
        if not queries:
            if exchanged and stack_pass.is_span(keys, Along(2)):
                keys, values = stack_pass.whole(keys, Along(2)), stack_pass.whole(values, Along(2))
            return keep(cache, keys, values, layer_idx, *args, **kwargs)
        plan = head_plan(queries, keys.shape[1], peers.size)
        held = _Held(plan.stored, peers.rank)
        mine = held.mine
        _claim(cache, layer_idx, held)
        if exchanged:
            parts = one_dtype(keys.transpose(1, 2), values.transpose(1, 2))
            arrived = to_heads(parts, plan, ("stored", "stored"), stack_pass.extent.length, peers)
            keys, values = arrived[0].transpose(1, 2), arrived[1].transpose(1, 2)
        else:
            keys, values = keys[:, mine.start : mine.stop], values[:, mine.start : mine.stop]
        keys, values = keep(cache, keys, values, layer_idx, *args, **kwargs)
        setattr(cache.layers[layer_idx], _MARK, held)
        cache.update = _refuse  # for whoever comes to it without us
        self._context.keep(keys, held.all_heads)
        return keys, values

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update_conv_state(self, columns: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """[B, C, s | S] → what a convolution is given: my span as it is, and every rank caches the end of the whole."""
        cache, stack_pass = self._cache, self._context.stack_pass
        width = kwargs.get("conv_kernel_size")
        if stack_pass is None or not stack_pass.is_shared or width is None:
            whole: Tensor = cache.update_conv_state(columns, layer_idx, *args, **kwargs)
            return whole
        last = last_columns(columns, width, stack_pass.extent.length, self._peers)
        cache.update_conv_state(last, layer_idx, *args, **kwargs)
        return columns


class _Layers:
    """The layers of a cache, of which those that are looked at tell `context` whether they hold this rank's heads."""

    def __init__(self, layers: list[Any], context: Context) -> None:
        self._layers, self._context = layers, context

    def __getitem__(self, index: int) -> Any:
        layer = self._layers[index]
        held = held_in(layer)
        if held is not None and layer.is_initialized:
            self._context.keep(layer.keys, held.all_heads)
        return layer

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def can_fill_from_spans(cache: Any, index: int | None) -> bool:
    """Whether mixers on spans can fill a layer of a cache: it has no states yet, and is not to keep earlier ones."""
    layer: Any = cache.layers[index] if index is not None and index < len(cache.layers) else None
    before = getattr(layer, "has_previous_state", None)
    return before is not None and not any(before.values()) and not layer.record_past


def held_in(layer: Any) -> _Held | None:
    held: _Held | None = getattr(layer, _MARK, None)
    return held


def cached_length(cache: Cache) -> int:
    """The number of tokens that a cache has seen; 0 where it only has states that do not tell."""
    try:
        return int(cache.get_seq_length())
    except ValueError:  # transformers' way to say that there is no attention in it
        return 0


def told_of(cache: Any) -> str:
    """What this rank holds in a filled cache, as text for people."""
    layers = layers_of(cache)
    marks = [held for layer in layers if (held := held_in(layer)) is not None]
    whole = len(layers) - len(marks)
    if not marks:
        return "are whole on every rank"
    stored = {(sum(map(len, held.stored)), held.all_heads) for held in marks}
    more = [f"{copies} for {heads}" for copies, heads in sorted(stored) if copies > heads]
    text = "hold this rank's heads" + (f", all but {whole} of {len(layers)} layers, which are whole" if whole else "")
    return text + (f"; ranks hold some key heads alike: {', '.join(more)}" if more else "")


def sizes(cache: Any) -> tuple[int, int]:
    """Bytes of the tensors in a filled cache: of those that this rank holds, and of those that one process would hold.

    That one would hold the keys and values of all heads, where this rank holds those of its own.
    """
    mine = whole = 0
    for layer in layers_of(cache):
        held = held_in(layer)
        heads, of_mine = (1, 1) if held is None else (held.all_heads, len(held.mine))
        for (name, *_), tensor in tensors(vars(layer)):
            mine += tensor.nbytes
            whole += tensor.nbytes * heads // of_mine if name in ("keys", "values") else tensor.nbytes
    return mine, whole


def layers_of(cache: Any) -> list[Any]:
    """The layers of a cache, or of both that one of an encoder–decoder is made of."""
    parts = [getattr(cache, f"{name}_attention_cache", None) for name in ("self", "cross")]
    layers: list[Any] = [layer for one in parts if one is not None for layer in one.layers] or cache.layers
    return layers


def one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the rotary embedding leaves q and k wider than v; kernels would cast them, so we do it first."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise UnsupportedError(f"query, key and value have different dtypes: {dtypes}")
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _claim(cache: Cache, index: int, wanted: _Held) -> None:
    """Leave only the wanted heads in a layer of a cache that a model on its own has filled, or made room in.

    Raises UnsupportedError for a layer that holds others, or holds them in a way that is not known here.
    """
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    held = held_in(layer)
    if layer is None or held == wanted or not layer.is_initialized:
        return
    if held is not None:
        raise UnsupportedError(
            f"layer {index} of the cache holds the heads of rank {held.rank} of {len(held.stored)}, and this is rank "
            f"{wanted.rank} of {len(wanted.stored)}: run the prompt again with a new cache"
        )
    if (
        not isinstance(layer, (DynamicLayer, StaticLayer))
        or layer.keys is None
        or layer.keys.shape[1] != wanted.all_heads
    ):
        raise UnsupportedError(
            f"layer {index} of the cache is a {type(layer).__name__} that was filled without sequence parallelism, and "
            "cannot be cut to this rank's heads: run the prompt again with a new cache"
        )
    for name in ("keys", "values"):
        setattr(layer, name, getattr(layer, name)[:, wanted.mine.start : wanted.mine.stop].contiguous())
    if isinstance(layer, StaticLayer):
        layer.num_heads = len(wanted.mine)


def _refuse(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """What stands in a cache's `update` once it holds one rank's heads."""
    raise UnsupportedError(
        "this cache was filled under sequence parallelism and holds this rank's heads only, so a model that is not "
        "enabled cannot go on with it: run the prompt again with a new cache, or keep the model enabled"
    )
