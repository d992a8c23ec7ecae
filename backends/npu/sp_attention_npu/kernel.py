"""Requests as calls of `torch_npu.npu_fusion_attention`.

What the operator takes is in torch-npu's documentation of it (torch_npu/_op_plugin_docs.py, 2.13), which differs from
torch's function in what is masked (True is hidden), in the scale (1 unless it is given) and in windows (the keys before
a query, itself not counted).
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention.kernels.request import Mask, Request
from sp_attention_npu.calls import FULL, TOKENS, Dense, Packed, Pattern, Whole, calls, dense

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS, HEAD_SIZE = 256, 768
TRIANGLE = 2048


def refuses(request: Request) -> str | None:
    """None for what the operator does exactly, else the reason."""
    query, value, mask = request.query, request.value, request.mask
    size = max(query.shape[3], value.shape[3])
    if request.softcap is not None:
        return "npu_fusion_attention has no softcap"
    if request.bias is not None and request.bias.requires_grad:
        return "npu_fusion_attention gives no gradient for a bias on the scores"
    if query.dtype not in DTYPES:
        return f"npu_fusion_attention takes bfloat16, float16 and float32, not {query.dtype}"
    if size > HEAD_SIZE:
        return f"npu_fusion_attention takes heads of up to {HEAD_SIZE} numbers, not {size}"
    if query.shape[2] > HEADS:
        return f"npu_fusion_attention takes up to {HEADS} heads, not {query.shape[2]}"
    if max(mask.query_length, mask.key_length) > TOKENS:
        return f"npu_fusion_attention takes sequences of up to {TOKENS:,} tokens"
    if not request.dropout < 1:
        return "npu_fusion_attention cannot drop all"
    return None


def attend(request: Request) -> Tensor:
    """Attention by Ascend's operator; see `Request` and `Backend.attend` for the contract."""
    # The operator wants values that are not wider than keys.
    missing = request.value.shape[3] - request.query.shape[3]
    if missing > 0:
        request = replace(request, query=F.pad(request.query, (0, missing)), key=F.pad(request.key, (0, missing)))
    if request.bias is not None:
        return _with_bias(request, request.bias)
    found = calls(request.mask)
    if isinstance(found, Whole):
        keys = slice(found.keys.start, found.keys.stop)
        key, value = request.key[:, keys], request.value[:, keys]
        return _operate(request, request.query, key, value, "BSND", **_sparse(found.pattern, request.mask))
    if isinstance(found, Dense):
        out = _operate(request, request.query, request.key, request.value, "BSND", **_masked(found, request))
        return out.masked_fill(found.blind, 0)
    return _packed(request, found)


def _packed(request: Request, found: tuple[Packed, ...]) -> Tensor:
    rows = request.query.shape[:2]
    query, key, value = (tensor.flatten(0, 1) for tensor in (request.query, request.key, request.value))
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    for call in found:
        options = _sparse(call.pattern, request.mask)
        options |= {"actual_seq_qlen": call.query_ends, "actual_seq_kvlen": call.key_ends}
        taken = _take(query, call.queries), _take(key, call.keys), _take(value, call.keys)
        part = _take(_operate(request, *taken, "TND", **options), call.kept)
        whole = call.queries is None and call.kept is None
        out = part if whole else out.index_copy(0, call.places, part)
    return out.reshape(*rows, *out.shape[1:])


def _take(tensor: Tensor, places: Tensor | None) -> Tensor:
    return tensor if places is None else tensor.index_select(0, places)


def _with_bias(request: Request, bias: Tensor) -> Tensor:
    """A bias comes with a mask of every query and key, which it is as large as."""
    heads, queries = request.query.shape[2], request.query.shape[1]
    found = dense(request.mask.dense() & (bias > float("-inf")))
    # Where it is -inf it hides, and the operator need not see that.
    finite = bias.to(request.query.dtype).clamp(min=torch.finfo(request.query.dtype).min)
    bias = finite.expand(-1, heads, queries, -1)
    # Only the second version of the operator adds it to the scaled scores (type 0); the first one scales it too.
    options = {"pse": bias, "pse_type": 0, **_masked(found, request)}
    out = _operate(request, request.query, request.key, request.value, "BSND", second=True, **options)
    return out.masked_fill(found.blind, 0)


def _operate(
    request: Request, query: Tensor, key: Tensor, value: Tensor, layout: str, *, second: bool = False, **options: Any
) -> Tensor:
    """One call: [B, S, h, D] tensors in layout "BSND", [T, h, D] tensors in layout "TND"."""
    # They are there where tensors of an NPU are: torch-npu registers them with torch.
    operator = torch.ops.npu.npu_fusion_attention_v2 if second else torch.ops.npu.npu_fusion_attention
    if request.sinks is not None:
        options["sink"] = request.sinks.float()
    heads, kept = request.query.shape[2], 1 - request.dropout
    out: Tensor = operator(query, key, value, heads, layout, scale=request.scale, keep_prob=kept, **options)[0]
    return out


def _sparse(pattern: Pattern, mask: Mask) -> dict[str, Any]:
    if pattern == FULL:
        return {}
    triangle = mask.once("npu triangle", lambda: _triangle(mask.device))
    limits = {"pre_tockens": pattern.before, "next_tockens": pattern.after}
    return {"sparse_mode": pattern.mode, "atten_mask": triangle, **limits}


def _triangle(device: torch.device) -> Tensor:
    """What sparse modes 2, 3 and 4 want for a mask, however long the sequences are."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)


def _masked(call: Dense, request: Request) -> dict[str, Any]:
    """The operator takes masks that differ by head for every row of the batch only."""
    rows = request.query.shape[0] if call.hidden.shape[1] > 1 else -1
    return {"sparse_mode": 1, "atten_mask": call.hidden.expand(rows, -1, -1, -1)}
