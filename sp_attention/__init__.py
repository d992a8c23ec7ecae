"""Sequence parallelism for the transformers model you already have: `sp_attention.enable(model, backend="sdpa")`."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sp_attention.api import Handle, enable
    from sp_attention.distributed.gradients import average_gradients
    from sp_attention.errors import BackendError, BatchError, ShardedLogitsError, UnsupportedError
    from sp_attention.kernels.hookspecs import hookimpl
    from sp_attention.kernels.request import Backend, Mask, Request
    from sp_attention.loss.sharded_logits import ShardedLogits

__version__ = version("sp-attention")
__all__ = [
    "Backend",
    "BackendError",
    "BatchError",
    "Handle",
    "Mask",
    "Request",
    "ShardedLogits",
    "ShardedLogitsError",
    "UnsupportedError",
    "average_gradients",
    "enable",
    "hookimpl",
]


# Imported when first used: transformers' modelling code is slow, imports accelerate where it is installed, and is
# needed by few; and `sp-attention doctor` must answer where even torch cannot be imported.
_MODULES = {
    "kernels.request": ("Backend", "Mask", "Request"),
    "api": ("Handle", "enable"),
    "errors": ("BackendError", "BatchError", "ShardedLogitsError", "UnsupportedError"),
    "distributed.gradients": ("average_gradients",),
    "kernels.hookspecs": ("hookimpl",),
    "loss.sharded_logits": ("ShardedLogits",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"sp_attention.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
