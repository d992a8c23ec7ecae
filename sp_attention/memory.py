"""Memory that is written again instead of being asked of the system again: on a CPU, most of what an exchange costs.

The C library gives large pieces back when they are freed, so the next of that size is made of pages that the system has
to clear and map one by one, which takes several times as long as writing to them. Accelerators have allocators that
keep what is freed; there, and while torch compiles, tensors are made as ever.
"""

from dataclasses import dataclass, field
from weakref import ReferenceType, ref

import numpy
import torch
from torch import Tensor

# The C library keeps smaller pieces itself.
_LARGE = 2**17  # bytes
# How much of a piece a tensor fills at the least.
_FILLED = 0.8
# Bytes that are held, by those that were in use at one time: less, and pieces of one size are given up for another's in
# every layer.
_HELD = 1.25


@dataclass(eq=False)
class _Piece:
    """Some memory, and the array that stands for it while a tensor uses it: torch lets go of that with the storage."""

    memory: Tensor
    user: ReferenceType[numpy.ndarray]

    @property
    def is_free(self) -> bool:
        return self.user() is None

    def lend(self, size: int) -> Tensor:
        array = self.memory[:size].numpy()
        self.user = ref(array)
        return torch.from_numpy(array)


@dataclass(eq=False)
class Memory:
    """Pieces of memory for tensors on a CPU, each of which is free again when nobody holds its tensor or a view of it.

    It never holds more than a quarter more bytes than were in use at one time.
    """

    _pieces: list[_Piece] = field(default_factory=list)
    _most: int = 0

    @property
    def held(self) -> int:
        """Bytes of all pieces, free ones too."""
        return sum(piece.memory.numel() for piece in self._pieces)

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor without values, of the dtype and on the device of `like`."""
        size = torch.Size(shape).numel() * like.element_size()
        if like.device.type != "cpu" or size < _LARGE or torch.compiler.is_compiling() or type(like) is not Tensor:
            return like.new_empty(shape)
        return self._take(size).view(like.dtype).view(shape)

    def _take(self, size: int) -> Tensor:
        free = sorted((piece for piece in self._pieces if piece.is_free), key=lambda piece: piece.memory.numel())
        for piece in free:
            if size <= piece.memory.numel() <= size / _FILLED:
                return piece.lend(size)
        in_use = self.held - sum(piece.memory.numel() for piece in free)
        self._most = max(self._most, in_use + size)
        while self.held + size > self._most * _HELD:
            self._pieces.remove(free.pop())
        memory = torch.empty(size, dtype=torch.uint8)
        self._pieces.append(_Piece(memory, ref(memory.numpy())))
        return self._pieces[-1].lend(size)
