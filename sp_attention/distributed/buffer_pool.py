"""Buffers that are written again instead of being asked of the system again: on a CPU, most of an exchange's cost.

The C library gives large ones back when they are freed, so the next of that size is made of pages that the system has
to clear and map one by one, which takes several times as long as writing to them. Accelerators have allocators that
keep what is freed; there, and while torch compiles, tensors are made as ever.
"""

from dataclasses import dataclass, field
from weakref import finalize

import torch
from torch import Tensor

# The C library keeps smaller ones itself.
_LARGE = 2**17  # bytes
# How much of a buffer a tensor fills at the least.
_FILLED = 0.8
# Bytes that lie ready at most. Where sequences are so long that more would be of use, attention takes far longer than
# the system does to make pages.
_READY = 2**28


@dataclass(eq=False)
class BufferPool:
    """Buffers for tensors on a CPU, each of which lies ready when nobody holds its tensor or a view of it."""

    _ready: dict[int, Tensor] = field(default_factory=dict)  # By address, in the order in which they were given back.

    @property
    def ready(self) -> int:
        """Bytes that nobody uses."""
        return sum(buffer.numel() for buffer in self._ready.copy().values())

    def clear(self) -> None:
        """Give the system back what nobody uses."""
        self._ready.clear()

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous tensor without values, of the dtype and on the device of `like`."""
        size = torch.Size(shape).numel() * like.element_size()
        if like.device.type != "cpu" or size < _LARGE or torch.compiler.is_compiling() or type(like) is not Tensor:
            return like.new_empty(shape)
        buffer = self._take(size)
        # An array stands for the buffer while a tensor uses it: torch lets go of that with the storage.
        array = buffer[:size].numpy()
        finalize(array, self._give_back, buffer).atexit = False
        return torch.from_numpy(array).view(like.dtype).view(shape)

    def _take(self, size: int) -> Tensor:
        # Others may take and give back at any time, since any thread may let go of a tensor.
        for place, buffer in self._ready.copy().items():
            if size <= buffer.numel() <= size / _FILLED and self._ready.pop(place, None) is not None:
                return buffer
        return torch.empty(size, dtype=torch.uint8)

    def _give_back(self, buffer: Tensor) -> None:
        if buffer.numel() > _READY:
            return
        self._ready[buffer.data_ptr()] = buffer
        for place in self._ready.copy():
            if self.ready <= _READY:
                break
            self._ready.pop(place, None)
