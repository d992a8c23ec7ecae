"""What ranks can compare of key/value caches: not the keys and values, of which each rank has those of its own heads.

So a cache is marked with a number of what has filled it, of batches and of the number before, which all ranks have
alike. A cache that has none was filled by a model on its own, each rank's whole, and then its contents are compared.
"""

from typing import Any

from transformers.cache_utils import Cache

from sp_attention.region.kv_cache import cached_length, held_in, layers_of
from sp_attention.region.pytree import tensors

# The attribute of a cache that tells what has filled it. It goes along with copies of the cache.
_HISTORY = "_sp_attention_history"


def told_by_ranks(cache: Cache) -> dict[str, Any]:
    """What has to be alike on all ranks that go on from a cache, by name."""
    layers, length = layers_of(cache), cached_length(cache)
    # Nothing is left in an empty cache of what has filled it.
    is_empty = length == 0 and all("keys" in vars(layer) for layer in layers)
    history = None if is_empty else getattr(cache, _HISTORY, None)
    told: dict[str, Any] = {"layers": len(layers), "filled by": history}
    for number, layer in enumerate(layers):
        if is_empty or not getattr(layer, "is_initialized", True):
            continue
        held = {".".join(map(str, path)): tensor for path, tensor in tensors(vars(layer))}
        if history is None and held_in(layer) is None:
            told |= {f"{number}.{name}": tensor for name, tensor in held.items()}
        elif "keys" in held and "rows" not in told:
            told["rows"] = held["keys"].shape[0]
    return told


def note_filling(cache: Cache, number: int) -> None:
    """Note what has filled a cache: a forward with this number, which tells the cache's history before it too."""
    setattr(cache, _HISTORY, number)
