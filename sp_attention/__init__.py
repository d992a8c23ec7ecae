"""Sequence parallelism for the transformers model you already have: `sp_attention.enable(model, backend="sdpa")`."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sp_attention.attention import Backend, Mask, Request
from sp_attention.errors import BackendError, BatchError, ShardedLogitsError, UnsupportedError
from sp_attention.gradients import average_gradients
from sp_attention.hookspecs import hookimpl
from sp_attention.logits import ShardedLogits

if TYPE_CHECKING:
    from sp_attention.enabling import Handle, enable

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


def __getattr__(name: str) -> Any:
    # What works on models imports transformers' modelling code, which imports accelerate where it is installed.
    if name in ("enable", "Handle"):
        from sp_attention import enabling

        return getattr(enabling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
