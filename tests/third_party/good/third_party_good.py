"""A whole third-party plugin: attention written out, as kernel `written-out` on the CPU."""

import torch

import sp_attention


def attend(request: sp_attention.Request) -> torch.Tensor:
    repeats = request.query.shape[2] // request.key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, 2) for tensor in (request.key, request.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", request.query, key) * request.scale
    weights = scores.masked_fill(~request.mask.dense(), float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def refuses(request: sp_attention.Request) -> str | None:
    if request.softcap is not None or request.sinks is not None or request.bias is not None or request.dropout:
        return "it is plain attention only"
    return None


@sp_attention.hookimpl
def sp_attention_backends() -> list[sp_attention.Backend]:
    return [
        sp_attention.Backend("cpu", "written-out", attend, refuses=refuses),
        sp_attention.Backend("cpu", "not-here", attend, unavailable="it needs a moon; wait for one to rise"),
    ]
