"""Attention kernel `my_kernel` for sp_attention."""

from importlib.util import find_spec

import torch

from sp_attention import Backend, Request, hookimpl


def attend(request: Request) -> torch.Tensor:
    """Query [B, Sq, h, D], key [B, Sk, hkv, D], value [B, Sk, hkv, Dv] → [B, Sq, h, Dv]; the place of your kernel."""
    repeats = request.query.shape[2] // request.key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, 2) for tensor in (request.key, request.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", request.query, key) * request.scale
    weights = scores.masked_fill(~request.mask.dense(), float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def refuses(request: Request) -> str | None:
    """Why `attend` would not do exactly this, None where it does; shapes and dtypes are known, values are not."""
    for name in ("softcap", "sinks", "bias"):
        if getattr(request, name) is not None:
            return f"my_kernel has no {name}"
    return "my_kernel has no dropout" if request.dropout else None


@hookimpl
def sp_attention_backends() -> list[Backend]:
    """What this package offers. What `attend` needs is looked for here, and imported there."""
    missing = None if find_spec("torch") else "torch is not installed: pip install torch"
    return [Backend(device="cpu", kernel="my_kernel", attend=attend, refuses=refuses, unavailable=missing)]
