"""transformers' eager attention: the function that each of its files has for its own modules."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def eager_functions(module: nn.Module | None) -> Iterator[Callable[..., Any]]:
    """`eager_attention_forward` of the file that defines the module, and of those of the classes it derives from."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            yield function
