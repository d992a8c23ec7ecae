"""Gradients that have none of their own: whoever asks for second derivatives is told so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from sp_attention.errors import UnsupportedError

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """A `backward` of an autograd function whose gradients are constants, and say so where they are differentiated.

    As torch's, which raises a RuntimeError that names nothing a user has written.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # as without create_graph=True
            return found
        several = found if isinstance(found, tuple) else (found,)
        marked = tuple(_marked(one) if isinstance(one, Tensor) else one for one in several)
        return marked if isinstance(found, tuple) else marked[0]

    return once


def _marked(grad: Tensor) -> Tensor:
    marked: Tensor = _Constant.apply(grad.detach().requires_grad_())  # type: ignore[no-untyped-call]  # torch has no types for it
    return marked


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise UnsupportedError(
            "second derivatives (create_graph=True, and backward of a gradient) are not covered under sequence "
            "parallelism: compute them, from the forward on, within handle.suspended(), by the whole model on every "
            "rank"
        )
