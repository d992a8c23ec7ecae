"""The autocast context of now, for what backward computes again: it would not be in it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch


def autocast_of_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The context that is computed in now, for later."""
    if device.type == "meta":  # It has none.
        return nullcontext
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
