"""Buffers that are written again instead of being asked of the system again: on a CPU, most of an exchange's cost.

The C library gives large pieces back when they are freed, so the next of that size is made of pages that the system has
to clear and map one by one, which takes several times as long as writing to them. Accelerators have allocators that
keep what is freed; there, and while torch compiles, tensors are made as ever.
"""

from dataclasses import dataclass, field
from weakref import finalize

import torch
from torch import Tensor

# The C library keeps smaller pieces itself.
_LARGE = 2**17  # bytes
# How much of a piece a tensor fills at the least.
_FILLED = 0.8
# Bytes that lie ready at most. Where sequences are so long that more would be of use, attention takes far longer than
# the system does to make pages.
_READY = 2**28


@dataclass(eq=False)
class BufferPool:
    """Pieces of memory for tensors on a CPU, each of which lies ready when nobody holds its tensor or a view of it."""

    _ready: dict[int, Tensor] = field(default_factory=dict)  # By address, in the order in which they were given back.

    @property
    def ready(self) -> int:
        """Bytes that nobody uses."""
        return sum(piece.numel() for piece in self._ready.copy().values())

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor without values, of the dtype and on the device of `like`."""
        size = torch.Size(shape).numel() * like.element_size()
        if like.device.type != "cpu" or size < _LARGE or torch.compiler.is_compiling() or type(like) is not Tensor:
            return like.new_empty(shape)
        piece = self._take(size)
        # An array stands for the piece while a tensor uses it: torch lets go of that with the storage.
        array = piece[:size].numpy()
        finalize(array, self._give_back, piece).atexit = False
        return torch.from_numpy(array).view(like.dtype).view(shape)

    def _take(self, size: int) -> Tensor:
        # Others may take and give back at any time, since any thread may let go of a tensor.
        for place, piece in self._ready.copy().items():
            if size <= piece.numel() <= size / _FILLED and self._ready.pop(place, None) is not None:
                return piece
        return torch.empty(size, dtype=torch.uint8)

    def _give_back(self, piece: Tensor) -> None:
        if piece.numel() > _READY:
            return
        self._ready[piece.data_ptr()] = piece
        for place in self._ready.copy():
            if self.ready <= _READY:
                break
            self._ready.pop(place, None)
