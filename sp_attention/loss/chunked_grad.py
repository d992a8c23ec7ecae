"""Gradients of some tokens after the other, where those of all at once would take too much memory."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sp_attention.distributed.partition import spans


class ChunkedGrad:
    """Gradients of hidden states and of weights, by what is computed of the hidden states tile by tile, along `dim`.

    hidden: those of hidden states, None if nobody asks. of_weights: those of each weight, None where there are none;
    they are added up in float32 where weights are less precise.
    """

    def __init__(self, hidden: Tensor, dim: int, asked: bool, weights: Mapping[str, Tensor]) -> None:
        self.hidden = torch.empty_like(hidden) if asked else None
        self.of_weights: list[Tensor | None] = [None] * len(weights)
        # Copies without history, so that nobody's hooks on the weights see gradients of a tile.
        self._weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self._dim, self._done = dim, 0

    def add(self, compute: Callable[..., Tensor], tile: Tensor, *others: Tensor, grad: Tensor | None = None) -> Tensor:
        """Those of `compute(weights, tile, *others)`, which is returned, for the next tile.

        grad: the gradient of the result; a scalar needs none.
        """
        asked = self.hidden is not None
        tile = tile.detach().requires_grad_(asked)
        with torch.enable_grad():
            result = compute(self._weights, tile, *others)
        found = torch.autograd.grad(result, [tile] * asked + [*self._weights.values()], grad, allow_unused=True)
        if self.hidden is not None:
            size = tile.shape[self._dim]
            self.hidden.narrow(self._dim, self._done, size).copy_(found[0])
            self._done += size
        self.of_weights = [_added(*pair) for pair in zip(self.of_weights, found[asked:], strict=True)]
        return result.detach()


def in_tiles(count: int, dim: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of `count` tiles of each tensor, as equal as can be, some of them empty where they are short.

    Unlike those of `tensor_split`, gradients of the tiles are put together once; there, each is made as large as the
    tensor and added.
    """
    sizes = [len(span) for span in spans(tensors[0].shape[dim], count)]
    return list(zip(*(tensor.split(sizes, dim) for tensor in tensors), strict=True))


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        precise = more is None or more.dtype.itemsize >= torch.float32.itemsize
        return total if more is None else more if precise else more.float()
    return total.add_(more)
