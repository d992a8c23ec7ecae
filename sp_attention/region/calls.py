"""Calls of hooked modules that are in progress. torch tells hooks of errors, and not of an interrupt that ends a call.

Such a call is known by its frame, which is not among the callers of the code that runs now any more.
"""

import inspect
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import nn

# Where torch calls hooks and modules.
_TORCH = inspect.getfile(nn.Module)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module, and what runs around it. frame: torch's, which calls hooks and module; None if unknown."""

    around: Any
    running: Generator[Any, Any, Any]
    frame: FrameType | None = field(default_factory=lambda: _frame_of_torch())
    thread: int = field(default_factory=threading.get_ident)

    @property
    def has_ended(self) -> bool:
        """Whether it is over without a word. Another thread may wait for this one, as backward has its own."""
        if self.frame is None or self.thread != threading.get_ident():
            return False
        frame = inspect.currentframe()
        while frame is not None:
            if frame is self.frame:
                return False
            frame = frame.f_back
        return True


def _frame_of_torch() -> FrameType | None:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != _TORCH:
        frame = frame.f_back
    return frame
