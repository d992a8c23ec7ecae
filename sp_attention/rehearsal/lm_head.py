"""The head of a causal model: the module that makes its logits, and what the model does with them before the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from sp_attention.errors import UnsupportedError
from sp_attention.region.pytree import leaves, map_leaves, tensors

# A function of logits alone.
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Logits:
    """A tensor, and where it comes from: the result of `module`, given `inputs`, and what these steps make of it."""

    tensor: Tensor
    module: nn.Module
    inputs: tuple[Any, Any]
    steps: tuple[Step, ...] = ()


def logits_of(model: PreTrainedModel, batch: Mapping[str, Any]) -> Logits:
    """Where the logits come from that the model's loss is given, in a forward with a `batch` that has labels.

    The module is the outermost that has parameters. The steps are of a scale, a softcap, a dtype, or a part of the
    vocabulary. Raises UnsupportedError where there is more to it.
    """
    loss, given = model.loss_function, list[tuple[Tensor, Logits | None]]()
    calls: list[nn.Module] = []
    follow = _Follow()

    def noted(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Now, since what the loss does with them is no step: in float32 its `float` returns the same tensor.
        given.append((logits, follow.known.get(id(logits))))
        return loss(logits, *args, **kwargs)

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        calls.append(module)
        if isinstance(result, Tensor) and next(module.parameters(), None) is not None:
            follow.known[id(result)] = Logits(result, module, (args, kwargs))

    handles = [module.register_forward_hook(after, with_kwargs=True) for module in model.modules()]
    model.loss_function = noted
    try:
        with follow:
            model(**batch)
    finally:
        model.loss_function = loss
        for handle in handles:
            handle.remove()
    if len(given) != 1:
        raise UnsupportedError("the loss is not computed once")
    tensor, found = given[0]
    if found is None or tensor.dim() != 3:
        raise UnsupportedError(
            "the model does more with what its head returns than to scale or to cap it, before the loss"
        )
    before = dict(tensors(found.inputs))
    if calls.count(found.module) != 1 or before.keys() != {(0, 0)} or before[0, 0].dim() != 3:
        raise UnsupportedError(f"{type(found.module).__name__} is not called once, with hidden states and nothing else")
    return found


# Where the logits stand among the arguments of a function.
_HERE = object()
# The names of torch's functions that may be steps where they are given no other tensor: they do the same to each token,
# and in training as in evaluation.
_STEPS = {"add", "sub", "mul", "div", "mul_", "div_", "tanh", "to", "float", "contiguous", "__getitem__"}


class _Follow(TorchFunctionMode):
    """Follows the results of modules through steps; `known` has them by id, and keeps them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Logits] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        may_be_step = getattr(function, "__name__", None) in _STEPS
        given = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)] if may_be_step else []
        if len(given) == 1 and id(given[0]) in self.known:
            origin = self.known[id(given[0])]
            # Without the tensor itself, which would be kept.
            others = map_leaves(lambda _, leaf: _HERE if isinstance(leaf, Tensor) else leaf, (args, kwargs or {}))
            step: Step = partial(_step, function, others)
            self.known[id(result)] = replace(origin, tensor=result, steps=(*origin.steps, step))
        elif function is Tensor.__setitem__ or isinstance(result, Tensor):
            # What is written to is no longer what it was.
            self.known.pop(id(args[0] if result is None else result), None)
        return result


def _step(function: Any, others: Any, logits: Tensor) -> Tensor:
    args, kwargs = map_leaves(lambda _, leaf: logits if leaf is _HERE else leaf, others)
    result: Tensor = function(*args, **kwargs)
    return result
