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
BEFORE = "_sp_attention_forward"
# The attribute of a forward that is ours.
_OURS = "_sp_attention_is_ours"
# Runs a call of a model that was not begun by its hooks: given it, its own forward, and the arguments.
Direct = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def put_in_place(model: nn.Module, begun: Callable[[nn.Module], bool], direct: Direct) -> None:
    """Give a model a forward that lets `direct` run the calls that are not `begun`, as its hooks tell."""
    before = vars(model).get("forward")
    # A compiled model runs these as they are.
    begun, direct = torch.compiler.disable(begun), torch.compiler.disable(direct)

    @wraps(type(model).forward if before is None else before)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = partial(type(self).forward, self) if before is None else self.__dict__[BEFORE]
        return own(*args, **kwargs) if begun(self) else direct(self, own, args, kwargs)

    if before is not None:
        model.__dict__[BEFORE] = before
    mark(forward)
    # A method, which a copy of the model gets as one of its own.
    model.__dict__["forward"] = MethodType(forward, model)


def mark(forward: Callable[..., Any]) -> None:
    """Make a forward known for one of ours."""
    setattr(forward, _OURS, True)


def take_away(model: nn.Module) -> dict[str, Any]:
    """Give back what was there, unless others have wrapped it since: then it stays, and only passes on.

    Returns the attributes that are needed to put it there again.
    """
    held = model.__dict__
    if not _is_ours(getattr(held.get("forward"), "__func__", None)):
        return {}
    taken = {name: held.pop(name) for name in ("forward", BEFORE) if name in held}
    if BEFORE in taken:
        held["forward"] = taken[BEFORE]
    return taken


def is_reached(model: nn.Module) -> bool:
    """Whether calls of a model come to our forward: it is there, or what wraps it says so, as functools.wraps does."""
    forward: Any = model.__dict__.get("forward")
    while forward is not None and not _is_ours(forward):
        if isinstance(forward, partial):
            forward = getattr(forward, "__wrapped__", forward.func)
        else:
            forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward is not None


def is_of_its_class(model: nn.Module) -> bool:
    """Whether a module has the forward of its class, ours around it or not."""
    held = model.__dict__
    return "forward" not in held or (BEFORE not in held and _is_ours(getattr(held["forward"], "__func__", None)))


def _is_ours(forward: Any) -> bool:
    # What wraps it may have its attributes too, and is told by what it wraps: what is ours is no wrapper of ours.
    return _OURS in getattr(forward, "__dict__", {}) and not _is_ours(getattr(forward, "__wrapped__", None))
