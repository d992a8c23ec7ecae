"""Causal attention of the last queries of a sequence: each sees all keys before the first of them, and causal ones.

On a CPU torch has no flag for it, and a mask makes its kernel slower by more than a half. So it is two calls without a
mask, over the keys before and over the queries' own, put together by their log-sum-exp as in Liu et al. 2023, "Ring
Attention" (arXiv 2310.01889), section 3; backward gives each the log-sum-exp of both. On other devices torch's own
`causal_lower_right` tells its kernels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right


def causal_after(query: Tensor, key: Tensor, value: Tensor, *, dropout: float, scale: float, grouped: bool) -> Tensor:
    """[B, h, n, D], [B, hkv, K, D], [B, hkv, K, D] → [B, h, n, D]: query i sees keys up to K - n + i; K is more than n.

    grouped: h is more than hkv.
    """
    if query.device.type == "cpu" and not dropout:
        if grouped:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        result: Tensor = _Merged.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
        return result
    bias = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale, enable_gqa=grouped)


# torch has no types for `Function.apply`, hence the ignore above.
class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        sizes = (key.shape[2] - query.shape[2], query.shape[2])
        parts = zip(key.split(sizes, 2), value.split(sizes, 2), (False, True), strict=True)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        (before, first), (own, second) = (attend(query, k, v, 0.0, causal, scale=scale) for k, v, causal in parts)
        total = torch.logaddexp(first, second)
        share, rest = ((part - total).exp().unsqueeze(-1) for part in (first, second))
        out: Tensor = (before * share + own * rest).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.sizes, ctx.scale = sizes, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        parts = zip(key.split(ctx.sizes, 2), value.split(ctx.sizes, 2), (False, True), strict=True)
        slope = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        (query_grad, *before), (more, *own) = (
            slope(grad, query, k, v, out, total, 0.0, causal, scale=ctx.scale) for k, v, causal in parts
        )
        key_grad, value_grad = (torch.cat(pair, 2) for pair in zip(before, own, strict=True))
        return query_grad + more, key_grad, value_grad, None
