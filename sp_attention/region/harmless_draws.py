"""Random numbers that are no longer random: a training forward gives the same for every token, whole or sharded.

So it is training that is proven, with whatever models do in training alone, and not evaluation in its place.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sp_attention.region.pytree import tensors

# Operations that draw, and that torch does not mark as such.
_UNMARKED = {"random", "random_", "binomial"}
# The argument of an operation that is the chance to drop a number.
_CHANCES = ("dropout_p", "p_dropout", "dropout", "p")


class HarmlessDraws(TorchDispatchMode):
    """Within it nothing is dropped, noise is its mean, and what is compared with a chance is almost 1.

    That is what layers and paths are skipped by (`torch.rand(()) < chance`, a survival of 1 or 0), so none is; with
    `skips` all are, and that alone is of use then. What else is drawn, such as integers, starts from the same seed each
    time. `note` is told the shape of whatever is drawn.
    """

    def __init__(self, note: Callable[[torch.Size], None] | None = None, skips: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._note, self._skips = note, skips

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        chance = _chance(operation)
        if chance is not None:
            place, name = chance
            given = args[place] if place < len(args) else kwargs.get(name)
            if not given:
                return operation(*args, **kwargs)
            if place < len(args):
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs = {**kwargs, name: 0.0}
        elif not _draws(operation):
            return operation(*args, **kwargs)
        # Before and after: no draw depends on those before it, and whoever compares states sees other draws only.
        torch.manual_seed(0)
        result = operation(*args, **kwargs)
        torch.manual_seed(0)
        if self._note is not None:
            for _, tensor in list(tensors(result))[:1]:
                self._note(tensor.shape)
        if chance is None and isinstance(result, Tensor):
            _make_harmless(operation, args, kwargs, result, self._skips)
        return result


@cache
def _draws(operation: Any) -> bool:
    name = _name(operation)
    return torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ()) or name in _UNMARKED


@cache
def _chance(operation: Any) -> tuple[int, str] | None:
    """Place and name of the argument that is the chance to drop a number, None where there is none."""
    names = [argument.name for argument in operation._schema.arguments]
    drops = "dropout" in _name(operation)
    found = next((name for name in _CHANCES if name in names and (name != "p" or drops)), None)
    return None if found is None else (names.index(found), found)


def _name(operation: Any) -> str:
    return str(operation.overloadpacket.__name__)


def _make_harmless(operation: Any, args: Any, kwargs: Any, drawn: Tensor, skips: bool) -> None:
    """Write into what an operation has drawn what is harmless in its place."""
    names = (argument.name for argument in operation._schema.arguments)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    kind = _name(operation).split("_")[0]  # As of uniform_, rand_like, log_normal.
    if kind == "bernoulli":
        chances = given.get("p", given["self"] if drawn is not given["self"] else 1.0)
        drawn.copy_(torch.as_tensor(chances, device=drawn.device) > (1 if skips else 0))
    elif kind in ("rand", "uniform"):
        low, high = given.get("from", 0.0), given.get("to", 1.0)
        is_compared = (low, high) == (0.0, 1.0) and drawn.is_floating_point()
        almost = 0 if skips else 1 - torch.finfo(drawn.dtype).eps
        drawn.fill_(almost if is_compared else (low + high) / 2)
    elif kind in ("randn", "normal"):
        mean = given.get("mean", 0.0)
        drawn.copy_(torch.as_tensor(mean, device=drawn.device))
    elif kind in ("exponential", "log"):
        drawn.fill_(1.0)
