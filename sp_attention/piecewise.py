"""Parts of layers that treat each token alone, given some tokens at a time: less of what they compute exists at once.

A part, such as an MLP or a norm, is given no tokens when its layer calls it, then some at a time, again in backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from sp_attention.layout import spans
from sp_attention.trees import tensors


def fits(inputs: Any, output: Any) -> bool:
    """Whether a module was given a tensor [..., tokens, E] and nothing else, and returned [..., tokens, E']."""
    given = dict(tensors(inputs))
    if given.keys() != {(0, 0)} or not isinstance(output, Tensor):
        return False
    return given[0, 0].dim() in (2, 3) and output.shape[:-1] == given[0, 0].shape[:-1]


def keeps_more(module: nn.Module) -> bool:
    """Whether a module keeps more for backward than what it is given: a norm, or what has several matrices."""
    return matrices_in(module) != 1 and any(True for _ in module.parameters())


def matrices_in(module: nn.Module) -> int:
    """How many matrices a module and its parts have."""
    # ZeRO-3 keeps the shapes of what it has cut up.
    return sum(len(getattr(one, "ds_shape", one.shape)) > 1 for one in module.parameters())


def in_parts(tensor: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    """Views of `count` parts as equal as can be, some of them empty where the tensor is short.

    Unlike those of `tensor_split`, gradients of the parts are put together once; there, each is made as large as the
    tensor and added.
    """
    parts: tuple[Tensor, ...] = tensor.split([len(span) for span in spans(tensor.shape[dim], count)], dim)
    return parts


def hook_pieces(module: nn.Module, pieces: Callable[[nn.Module], int], draws: bool) -> list[RemovableHandle]:
    """Give a module that `fits` its tokens in so many pieces as `pieces` tells for each call.

    Nothing of a piece is kept for backward but its tokens: the module computes it again. `draws`: random numbers too.
    """
    entered: list[tuple[Tensor, int]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered.append((args[0], pieces(module)))
        return None if entered[-1][1] < 2 else ((args[0].narrow(-2, 0, 0), *args[1:]), kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given, count = entered.pop() if entered else (None, 1)
        if given is None or output is None or count < 2:
            return None
        # Not the module, whose hooks were called.
        compute = partial(module.forward, **kwargs)
        if torch.is_grad_enabled():
            compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=draws)
        return torch.cat([compute(piece, *args[1:]) for piece in in_parts(given, count, -2)], -2)

    before, after = torch.compiler.disable(before), torch.compiler.disable(after)
    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        # First, so that an engine still has the weights, and always, so that an error leaves nothing behind.
        module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True),
    ]
