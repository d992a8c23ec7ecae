"""Flags: arguments of a layer that are no tensors, and may ask it for more than it was proven for."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from sp_attention.region.masks import DOCUMENTS
from sp_attention.region.pytree import leaves

# A flag: its name, and its value; of a number, which may be a length, that it is given.
Flag = tuple[str, Any]

# What these ask for is known: nothing that is computed otherwise, or what the region makes whole.
_KNOWN = {
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "labels", "num_items_in_batch", "training",
    "logits_to_keep", "layer_idx", *DOCUMENTS,
}  # fmt: skip
# Recorded and made whole as well; but where a layer has an argument for it, it returns more.
_RECORDED = "output_router_logits"


def names_of_arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's arguments, in the order in which they are given without."""
    return tuple(inspect.signature(module.forward).parameters)


def flags_of(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[Flag]:
    """The flags among the arguments of a module whose arguments have these names, but for those that are known."""
    found: list[Flag] = []
    for path, leaf in leaves((args, kwargs)):
        if type(leaf) in (bool, int, float, str):
            name = path[1] if path[0] or int(path[1]) >= len(names) else names[int(path[1])]
            if not (name in _KNOWN or (name == _RECORDED and name not in names)):
                value = leaf if isinstance(leaf, (bool, str)) else "a number"
                found.append((".".join(map(str, (name, *path[2:]))), value))
    return frozenset(found)


def flags_of_calls(module: nn.Module, calls: Iterable[Any]) -> frozenset[Flag]:
    """All flags with which a module was called, by (args, kwargs), and those that it takes where none is given."""
    parameters = inspect.signature(module.forward).parameters
    absent = {name: one.default for name, one in parameters.items() if isinstance(one.default, (bool, str))}
    return flags_of((), (), absent).union(*(flags_of(tuple(parameters), *inputs) for inputs in calls))


def ask_for_more(known: frozenset[Flag], names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there are flags among the arguments of a module that are not known; one that is off asks for nothing."""
    new = flags_of(names, args, kwargs) - known
    return any(value is not False or (name, True) in known for name, value in new)
