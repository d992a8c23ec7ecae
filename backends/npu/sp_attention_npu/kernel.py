"""Requests as calls of `torch_npu.npu_fusion_attention`.

What the operator takes is in torch-npu's documentation of it (torch_npu/_op_plugin_docs.py, 2.13), which differs from
torch's function in what is masked (True is hidden), in the scale (1 unless it is given) and in windows (the keys before
a query, itself not counted).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention.kernels import varlen
from sp_attention.kernels.intervals import contiguous
from sp_attention.kernels.request import Mask, Request
from sp_attention.kernels.varlen import Calls, Pattern, Sequences

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS, HEAD_SIZE = 256, 768
# How many sequences one call takes, and how many tokens.
SEQUENCES, TOKENS = 1024, 2**20
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
    mask = request.mask
    whole = varlen.whole(mask)
    if whole is not None:
        pattern, keys = whole
        key, value = request.key[:, :keys], request.value[:, :keys]
        return _operate(request, request.query, key, value, "BSND", **_sparse(pattern, mask))
    found = mask.once("npu calls", lambda: _calls(mask))
    if isinstance(found, Calls):
        return _attend_sequences(request, found)
    out = _operate(request, request.query, request.key, request.value, "BSND", **_masked(found, request))
    return out.masked_fill(found.blind, 0)


def _attend_sequences(request: Request, calls: Calls) -> Tensor:
    mask = request.mask

    def call(query: Tensor, key: Tensor, value: Tensor, some: Sequences) -> Tensor:
        # The operator wants integers: where each sequence ends, without a zero in front.
        ends = mask.once(("npu ends", some), lambda: [e[1:].tolist() for e in (some.query_edges, some.key_edges)])
        options = {"actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1], **_sparse(some.pattern, mask)}
        return _operate(request, query, key, value, "TND", **options)

    return varlen.attend(calls, request.query, request.key, request.value, call)


@dataclass(frozen=True, eq=False)
class Dense:
    """A mask of every query and key.

    hidden: bool [1|B, 1|h, Sq, Sk], True where a query does not see a key; all False for a query that sees none, since
        nothing is known of what the operator does then. blind: bool [1|B, Sq, 1|h, 1], those queries.
    """

    hidden: Tensor
    blind: Tensor


def dense(allowed: Tensor) -> Dense:
    """From bool [1|B, 1|h, Sq, Sk], True where a query sees a key."""
    blind = ~allowed.any(-1, keepdim=True)
    return Dense(~allowed & ~blind, blind.transpose(1, 2))


def _calls(mask: Mask) -> Calls | Dense:
    """Padding between real keys would be many sequences, each with a copy of its keys. Reads the mask to the host."""
    if contiguous(mask):
        return varlen.calls(mask, SEQUENCES, TOKENS)
    # Only what is made of the bool form is kept.
    return dense(mask.dense(range(0, mask.query_length)))


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
    """In sparse mode 3 a query sees what is not after it, and in mode 4 at most so many keys before it and after it.

    In both the last query of a sequence stands at its last key.
    """
    if pattern == Pattern():
        return {}
    triangle = mask.once("npu triangle", lambda: _triangle(mask.device))
    if pattern == Pattern(causal=True):
        return {"sparse_mode": 3, "atten_mask": triangle}
    limits = {"pre_tockens": pattern.before, "next_tockens": pattern.after}
    return {"sparse_mode": 4, "atten_mask": triangle, **limits}


def _triangle(device: torch.device) -> Tensor:
    """What sparse modes 2, 3 and 4 want for a mask, however long the sequences are."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool, device=device).triu(1)


def _masked(call: Dense, request: Request) -> dict[str, Any]:
    """The operator takes masks that differ by head for every row of the batch only."""
    rows = request.query.shape[0] if call.hidden.shape[1] > 1 else -1
    return {"sparse_mode": 1, "atten_mask": call.hidden.expand(rows, -1, -1, -1)}
