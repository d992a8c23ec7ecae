"""Arguments of a forward that are none of the model's own, and that nothing in it reads, as batches of trainers have.

transformers hands them down through the layers to the attention function. They need not be cut, nor need anything be
gathered for them; and if something reads them after all, it is told that they were not to be read.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from inspect import signature
from types import CodeType
from typing import Any, NoReturn

from torch import Tensor, nn

from sp_attention.errors import UnsupportedError
from sp_attention.loss.no_tensor import NoTensor
from sp_attention.region.direct_call import is_of_its_class


class ReadError(UnsupportedError, AttributeError):
    """Something reads what nothing was found to read; an AttributeError, so that `hasattr` is answered."""


class Unread(NoTensor):
    """Stands in layers for a tensor that nothing reads."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Unread({self.name})"

    def _refuse(self, *_: Any) -> NoReturn:
        raise ReadError(
            f"the argument {self.name} is of no parameter of the model, and yet a layer reads it, which enable() did "
            "not see in its rehearsal: leave it out of the batch, or give the layer's forward a parameter of this name"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        next((one for one in given if isinstance(one, Unread)), cls("of a batch"))._refuse()


def unread(names: Iterable[str], modules: Iterable[nn.Module]) -> frozenset[str]:
    """Those of some names of arguments that the forward of no module mentions."""
    asked = [name for name in names if not name.startswith(("output_", "return_"))]  # Which transformers puts together.
    if not asked:
        return frozenset()
    modules = list(modules)
    if not all(map(is_of_its_class, modules)):
        return frozenset()  # Somebody else's, which may read anything.
    kinds: set[Any] = {type(module) for module in modules}
    return frozenset(name for name in asked if not any(name in _mentioned(kind) for kind in kinds))


def without_unread(value: Any, name: str, length: int) -> Any:
    """An argument of a layer that nothing reads, or what stands for it, where it may be of the tokens."""
    return Unread(name) if isinstance(value, Tensor) and value.numel() >= length else value


@cache
def _mentioned(kind: Any) -> frozenset[str]:
    """The parameters of the forward of a class, and of those that it inherits, and every text in their code."""
    found: set[str] = set()
    for base in kind.__mro__:
        function = vars(base).get("forward")
        while function is not None:
            found.update(signature(function, follow_wrapped=False).parameters)
            found.update(_texts(getattr(function, "__code__", None)))
            function = getattr(function, "__wrapped__", None)
    return frozenset(found)


def _texts(constant: Any) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for one in constant:
            yield from _texts(one)
    elif isinstance(constant, CodeType):
        for one in constant.co_consts:
            yield from _texts(one)
