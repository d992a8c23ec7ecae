"""Modules of layers that treat each token alone, given a tile of tokens at a time: less of what they compute exists.

A module, such as an MLP or a norm, is given no tokens when its layer calls it, then tile by tile, again in backward.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sp_attention.distributed.once_differentiable import once_differentiable
from sp_attention.distributed.sharded_params import belongs_to_engine
from sp_attention.kernels.autocast import autocast_of_now
from sp_attention.loss.chunked_grad import ChunkedGrad, in_tiles
from sp_attention.region.state import Around


def around_tiled(tiles_of: Callable[[nn.Module], int], draws: bool) -> Around:
    """Give a module [..., S, E] → [..., S, E'] its tokens in as many tiles as `tiles_of` tells for each call.

    Nothing of a tile is kept for backward but its tokens: the module computes it again. `draws`: random numbers too.
    """

    def around(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[Any, Any, Any]:
        given, tiles = args[0], tiles_of(module)
        if tiles < 2:
            yield None
            return None
        nothing = yield (given.narrow(-2, 0, 0), *args[1:]), kwargs
        if nothing is None:
            return None
        learned = {name: one for name, one in module.named_parameters() if one.requires_grad}
        call = _TiledCall(
            _Unhooked(module), args[1:], kwargs, nothing.detach(), [*learned], autocast_of_now(given.device)
        )
        if not (torch.is_grad_enabled() and (given.requires_grad or learned)):
            return call.in_turn(tiles, given)
        if draws or any(map(belongs_to_engine, module.parameters())):
            # torch's own knows about generators, and engines about its calls.
            again = partial(checkpoint, partial(call.result, {}), use_reentrant=False, preserve_rng_state=draws)
            return torch.cat([again(tile) for (tile,) in in_tiles(tiles, -2, given)], -2)
        return _Tiled.apply(call, tiles, given, *learned.values())  # type: ignore[no-untyped-call]  # torch has no types for it

    return around


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
        """The result for all tokens, made of so many tiles, one of which exists beside it at a time."""
        whole = self.nothing.new_empty(*hidden.shape[:-1], self.nothing.shape[-1])
        for tile, place in in_tiles(count, -2, hidden, whole):
            place.copy_(self.result({}, tile))
        return whole


class _Tiled(torch.autograd.Function):
    """`_TiledCall.in_turn` with gradients, for which each tile is computed again."""

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
        for tile, its_grad in in_tiles(ctx.count, -2, hidden, grad):
            grads.add(ctx.call.result, tile, grad=its_grad)
        pairs = zip(grads.of_weights, weights, strict=True)
        of_weights = [None if one is None else one.to(weight.dtype) for one, weight in pairs]
        return None, None, grads.hidden, *of_weights
