"""transformers' chunks of feed-forwards: `chunk_size_feed_forward`, which takes lengths only that it divides.

A rank's span need not be such a length. The numbers are the same without chunks, and `enable(mlp_tile=...)` takes less
memory too, by giving parts of layers some tokens at a time.
"""

from contextlib import ExitStack
from functools import partial

from torch import nn

# The attributes of layers, and of Reformer's LM head.
_SIZES = ("chunk_size_feed_forward", "chunk_size_lm_head")


def without_chunks(model: nn.Module, undo: ExitStack) -> int:
    """Let feed-forwards take their tokens at once until `undo`; returns the size of their chunks, 0 where it was so."""
    sizes = [0]
    for module in model.modules():
        for name in _SIZES:
            size = vars(module).get(name)
            if isinstance(size, int) and size:
                sizes.append(size)
                setattr(module, name, 0)
                undo.callback(partial(setattr, module, name, size))
    return max(sizes)
