"""torch's flex and varlen attention as kernels, to learn whether they would be right; they are not of the library."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpu_stages import machine
from sp_attention import testing
from sp_attention.kernels import varlen
from sp_attention.kernels.intervals import has_intervals
from sp_attention.kernels.request import Backend, Request
from sp_attention.kernels.varlen import Sequences


def backends(device: torch.device) -> list[Backend]:
    """Attention written out in their place where the CPU stands in: neither has a backward there."""
    if machine.is_stand_in(device):
        return [
            Backend(device.type, f"{name}, a stand-in", testing.attend, refuses=refuses)
            for name, refuses in (("torch's flex", refuses_flex), ("torch's varlen", refuses_varlen))
        ]
    return [
        Backend(device.type, "torch's flex", flex, refuses=refuses_flex),
        Backend(device.type, "torch's varlen", by_varlen, refuses=refuses_varlen),
    ]


def refuses_flex(request: Request) -> str | None:
    for name in ("sinks", "dropout"):
        if getattr(request, name):
            return f"this trial has no {name}"
    return "this trial has no mask tensors" if request.mask.explicit is not None else None


def flex(request: Request) -> Tensor:
    """By a block mask of `Mask.allows`, compiled; softcap and bias as modifications of scores."""
    mask, bias, cap = request.mask, request.bias, request.softcap

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask.allows(batch, torch.zeros_like(head), query + mask.offset, key)

    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        score = score if cap is None else cap * torch.tanh(score / cap)
        return score if bias is None else score + wide[batch, head, query, key]

    wide = None if bias is None else bias.expand(mask.batch, request.query.shape[2], mask.query_length, mask.key_length)
    blocks = create_block_mask(
        visible, mask.batch, None, mask.query_length, mask.key_length, device=request.query.device
    )
    query, key, value = (tensor.transpose(1, 2) for tensor in (request.query, request.key, request.value))
    out = torch.compile(flex_attention, dynamic=False)(
        query,
        key,
        value,
        score_mod=modified if cap is not None or bias is not None else None,
        block_mask=blocks,
        scale=request.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def refuses_varlen(request: Request) -> str | None:
    for name in ("sinks", "dropout", "softcap", "bias"):
        if getattr(request, name) is not None and getattr(request, name) != 0.0:
            return f"torch's varlen attention has no {name}"
    if request.query.shape[3] != request.value.shape[3]:
        return "this trial has values of the size of keys"
    return None if has_intervals(request.mask) else "torch's varlen attention takes no mask functions and tensors"


def by_varlen(request: Request) -> Tensor:
    """By sequences of various lengths, as flash-attn's packages are called."""
    from torch.nn.attention.varlen import varlen_attn  # which older versions of torch have not

    def call(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Tensor:
        pattern = sequences.pattern
        window = (-1 if pattern.before is None else pattern.before, -1 if pattern.after is None else pattern.after)
        result: Tensor = varlen_attn(
            query,
            key,
            value,
            sequences.query_edges,
            sequences.key_edges,
            sequences.longest_query,
            sequences.longest_key,
            scale=request.scale,
            window_size=(window[0], 0) if pattern.causal else window,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return result

    calls = request.mask.once("trial of varlen", lambda: varlen.calls(request.mask))
    return varlen.attend(calls, request.query, request.key, request.value, call)
