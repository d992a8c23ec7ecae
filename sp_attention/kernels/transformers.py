"""Kernels `transformers:<key>`: the attention functions that transformers itself knows.

They get the mask in transformers' own form, built by transformers' own builder for that key from our description.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sp_attention.attention import Backend, Mask, Request
from sp_attention.errors import UnsupportedError
from sp_attention.hookspecs import hookimpl

# Keys whose function takes the whole mask as one tensor, so that nothing of the mask can get lost on the way.
TENSOR_MASKS = ("eager", "sdpa")


@hookimpl
def sp_attention_backends() -> list[Backend]:
    keys = {"eager", *ALL_ATTENTION_FUNCTIONS}
    return [_backend(key) for key in sorted(keys) if not key.startswith(("paged|", "sp_attention"))]


def _backend(key: str) -> Backend:
    reason = None
    if key not in TENSOR_MASKS:
        reason = "its mask does not travel as a tensor, which is not covered yet; use sdpa or transformers:eager"
    return Backend(
        device="any", kernel=f"transformers:{key}", attend=_attend_by(key), unavailable=reason, refuses=_refuses_by(key)
    )


def _refuses_by(key: str) -> Callable[[Request], str | None]:
    def refuses(request: Request) -> str | None:
        if key == "eager" and _eager_function(request.module) is None:
            return f"{type(request.module).__name__} has no eager_attention_forward in its module"
        if request.softcap is not None and key != "eager":
            return f"transformers' {key} attention has no softcap"
        if request.sinks is not None:
            return "attention sinks are not covered for transformers' functions yet"
        if request.bias is not None:
            return "an additive bias is not covered for transformers' functions yet"
        return None

    return refuses


def _attend_by(key: str) -> Callable[[Request], Tensor]:
    def attend(request: Request) -> Tensor:
        assert request.module is not None
        function = _eager_function(request.module) if key == "eager" else ALL_ATTENTION_FUNCTIONS[key]
        assert function is not None
        options: dict[str, Any] = {} if request.softcap is None else {"softcap": request.softcap}
        out, _ = function(
            HeadView(request.module, request.query.shape[2] // request.key.shape[2]),
            *(tensor.transpose(1, 2) for tensor in (request.query, request.key, request.value)),
            request.mask.once(("transformers", key, request.query.dtype), lambda: _native_mask(key, request)),
            scaling=request.scale,
            dropout=request.dropout,
            is_causal=request.mask.causal,
            **options,
        )
        result: Tensor = out
        return result

    return attend


def _native_mask(key: str, request: Request) -> Tensor | None:
    """The mask that transformers would have built for `key`: bool or additive [B, 1, Sq, Sk], or None if not needed."""
    mask: Mask = request.mask
    if mask.explicit is not None:
        allowed = mask.dense()
        if key == "eager":
            return torch.zeros_like(allowed, dtype=request.query.dtype).masked_fill_(
                ~allowed, torch.finfo(request.query.dtype).min
            )
        return allowed
    result: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[key](
        batch_size=mask.batch,
        q_length=mask.query_length,
        kv_length=mask.key_length,
        q_offset=mask.key_length - mask.query_length,
        mask_function=mask.allows,
        allow_is_causal_skip=mask.causal and mask.window is None and mask.documents is None and mask.padding is None,
        allow_is_bidirectional_skip=not mask.causal and mask.documents is None and mask.padding is None,
        dtype=request.query.dtype,
        device=mask.device,
        config=request.module.config if request.module is not None else None,
    )
    return result


def _eager_function(module: nn.Module | None) -> Callable[..., Any] | None:
    """`eager_attention_forward` of the file that defines the module, or one of the classes it derives from."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            found: Callable[..., Any] = function
            return found
    return None


class HeadView:
    """The attention module as transformers' functions see it: with the head groups of this rank, and no tensors.

    A tensor of the module is of all heads, and nothing tells how to cut it.
    """

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module = module
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, Tensor):
            raise UnsupportedError(
                f"{type(self._module).__name__}: its eager attention reads the tensor {name!r} from the module, "
                "which holds all heads; this is not covered yet"
            )
        return value
