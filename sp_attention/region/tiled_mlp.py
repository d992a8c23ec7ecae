"""Parts of layers that treat each token alone, given some tokens at a time: less of what they compute exists at once.

A part, such as an MLP or a norm, is given no tokens when its layer calls it, then some at a time, again in backward.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from sp_attention.distributed.sharded_params import belongs_to_engine
from sp_attention.loss.chunked_grad import ChunkedGrad, autocast_of_now, in_tiles
from sp_attention.region.pytree import tensors


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


def tile_module(module: nn.Module, pieces: Callable[[nn.Module], int], draws: bool) -> list[RemovableHandle]:
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
        learned = {name: one for name, one in module.named_parameters() if one.requires_grad}
        call = _TiledCall(
            _Unhooked(module), args[1:], kwargs, output.detach(), [*learned], autocast_of_now(given.device)
        )
        if not (torch.is_grad_enabled() and (given.requires_grad or learned)):
            return call.in_turn(count, given)
        if draws or any(map(belongs_to_engine, module.parameters())):
            # torch's own knows about generators, and engines about its calls.
            again = partial(checkpoint, partial(call.result, {}), use_reentrant=False, preserve_rng_state=draws)
            return torch.cat([again(piece) for (piece,) in in_tiles(count, -2, given)], -2)
        return _Tiled.apply(call, count, given, *learned.values())  # type: ignore[no-untyped-call]  # torch has no types for it

    before, after = torch.compiler.disable(before), torch.compiler.disable(after)
    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        # First, so that an engine still has the weights, and always, so that an error leaves nothing behind.
        module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True),
    ]


class _Unhooked(nn.Module):
    """A module without its own hooks, which were called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _TiledCall:
    """A call of a module, with what it was given besides hidden states.

    nothing: what it returns for no tokens. names: those of what it learns. autocast: the context that it was called in.
    """

    unhooked: _Unhooked
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nothing: Tensor
    names: list[str]
    autocast: Callable[[], AbstractContextManager[Any]]

    def result(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """[..., n, E] → [..., n, E'], with these weights in place of the module's."""
        own = {f"module.{name}": weight for name, weight in weights.items()}
        # Contiguous as in one process, which some code takes for granted: GPT-2's views of several rows.
        args = (hidden.contiguous(), *self.args)
        with self.autocast():
            result: Tensor = functional_call(self.unhooked, own, args, dict(self.kwargs))
        return result

    def in_turn(self, count: int, hidden: Tensor) -> Tensor:
        """The result for all tokens, made of so many parts, one of which exists beside it at a time."""
        whole = self.nothing.new_empty(*hidden.shape[:-1], self.nothing.shape[-1])
        for part, place in in_tiles(count, -2, hidden, whole):
            place.copy_(self.result({}, part))
        return whole


class _Tiled(torch.autograd.Function):
    """`_TiledCall.in_turn` with gradients, for which each part is computed again."""

    @staticmethod
    def forward(ctx: Any, call: _TiledCall, count: int, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.call, ctx.count = call, count
        ctx.save_for_backward(hidden, *weights)
        return call.in_turn(count, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *weights = ctx.saved_tensors
        grads = ChunkedGrad(hidden, -2, ctx.needs_input_grad[2], dict(zip(ctx.call.names, weights, strict=True)))
        for part, its_grad in in_tiles(ctx.count, -2, hidden, grad):
            grads.add(ctx.call.result, part, grad=its_grad)
        pairs = zip(grads.of_weights, weights, strict=True)
        of_weights = [None if one is None else one.to(weight.dtype) for one, weight in pairs]
        return None, None, grads.hidden, *of_weights
