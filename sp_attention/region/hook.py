"""A hook of this library, which is known for one wherever it is: in a copy of a model too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sp_attention.region.unpicklable import Unpicklable


class Hook(Unpicklable):
    """A function that a module calls. A compiled model runs it as it is, and compiles what is between its hooks.

    layer: the name of the layer that it is around; empty around other modules.
    """

    def __init__(self, function: Callable[..., Any], layer: str = "") -> None:
        self._function, self.layer = function, layer

    # Here, and not around the function: one frame that calls many is compiled again for each.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of ours."""
    return any(isinstance(hook, Hook) for hook in module._forward_pre_hooks.values())


def layer_name(module: nn.Module) -> str | None:
    """The name of the layer that a module is, as our hooks on it say."""
    return next(
        (hook.layer for hook in module._forward_pre_hooks.values() if isinstance(hook, Hook) and hook.layer), None
    )
