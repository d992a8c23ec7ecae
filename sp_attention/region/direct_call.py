"""`model.forward(...)` called as a method, past the hooks of the model, as sentence-transformers and PEFT do.

An enabled model has an attribute `forward` of its own, which runs around such a call what its hooks would have run. In
a call of the model itself it only passes on.
"""

from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn

# What an instance had in place of the forward of its class. An attribute, so that copies have their own.
_BEFORE = "_sp_attention_forward"
# Runs a call of a model that was not begun by its hooks: given it, its own forward, and the arguments.
Direct = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def put_in_place(model: nn.Module, begun: Callable[[nn.Module], bool], direct: Direct) -> Any:
    """Give a model a forward that lets `direct` run the calls that are not `begun`, as its hooks tell; returns it."""
    before = vars(model).get("forward")
    # A compiled model runs these as they are.
    begun, direct = torch.compiler.disable(begun), torch.compiler.disable(direct)

    @wraps(type(model).forward if before is None else before)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = partial(type(self).forward, self) if before is None else self.__dict__[_BEFORE]
        return own(*args, **kwargs) if begun(self) else direct(self, own, args, kwargs)

    if before is not None:
        model.__dict__[_BEFORE] = before
    # A method, which a copy of the model gets as one of its own.
    model.__dict__["forward"] = MethodType(forward, model)
    return forward


def take_away(model: nn.Module, ours: Any) -> None:
    """Give back what was there, unless others have wrapped it since: then it stays, and only passes on."""
    if getattr(model.__dict__.get("forward"), "__func__", None) is ours:
        del model.__dict__["forward"]
        before = model.__dict__.pop(_BEFORE, None)
        if before is not None:
            model.__dict__["forward"] = before


def is_reached(model: nn.Module, ours: Any) -> bool:
    """Whether calls of a model come to our forward: it is there, or what wraps it says so, as functools.wraps does."""
    forward: Any = model.__dict__.get("forward")
    while forward is not None and forward is not ours:
        if isinstance(forward, partial):
            forward = getattr(forward, "__wrapped__", forward.func)
        else:
            forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward is ours
