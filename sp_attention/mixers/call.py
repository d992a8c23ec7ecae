"""A call of a mixer function: its arguments by name, and the same call with others."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Call:
    """A call of `function`, whose positional parameters have these names.

    Arguments stay positional or by name as they were, since kernels in place of a function may order them otherwise.
    """

    function: Callable[..., Any]
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.names, self.args, strict=False)) | dict(self.kwargs)

    def with_others(self, others: Mapping[str, Any]) -> "Call":
        """The call with these arguments in place of those of the same names."""
        places = zip(self.names, self.args, strict=False)
        args = [others.get(name, value) for name, value in places] + [*self.args[len(self.names) :]]
        return replace(
            self, args=tuple(args), kwargs={name: others.get(name, one) for name, one in self.kwargs.items()}
        )

    def run(self) -> Any:
        return self.function(*self.args, **self.kwargs)


def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the parameters that may be given by position. Raises ValueError where nothing tells them."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD))
