"""Attention by a flash-attn package, exactly as a request asks for it.

Sinks, where the package has none: a sink takes the share sigmoid(sink - lse) of a query's attention, where lse is the
log-sum-exp of its scores, and what is left of the output is out · sigmoid(lse - sink). The packages return lse without
a gradient. It has one that their public functions can compute: d lse = Σ_j P_j d score_j, so with scores scale · q · k
the gradient for q is scale · Σ_j P_j k_j, an attention whose values are the keys, and the one for k is what such an
attention passes to its values. It costs one more attention, in backward only. A further key for the sink, as our `sdpa`
has it, would need no gradient of lse, but a sliding window would hide it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sp_attention import Request
from sp_attention.kernels import varlen
from sp_attention.kernels.varlen import Pattern, Sequences
from sp_attention_flash.packages import Options, Package, call


def attend(package: Package, request: Request) -> Tensor:
    """[B, Sq, h, Dv]; see `Backend.attend` and `Request` for the contract."""
    query, key, value = _of_sizes_that_fit(request.query, request.key, request.value)
    mask, sinks = request.mask, request.sinks
    native = None if sinks is None or not package.sinks else sinks.float()
    options = Options(request.scale, request.softcap, request.dropout, native)
    sinks = None if package.sinks else sinks
    whole = varlen.whole(mask)
    if whole is not None:
        pattern, keys = whole
        out = _attend(package, query, key[:, :keys], value[:, :keys], pattern, None, options, sinks)
    else:

        def some(query: Tensor, key: Tensor, value: Tensor, one: Sequences) -> Tensor:
            return _attend(package, query, key, value, one.pattern, one, options, sinks)

        calls = mask.once("flash sequences", lambda: varlen.calls(mask))
        out = varlen.attend(calls, query, key, value, some)
    return out[..., : request.value.shape[3]]


def size_that_fits(size: int, value_size: int) -> int:
    """The head size that a request is computed in: the packages want one size for all, and a multiple of 8."""
    return -(-max(size, value_size) // 8) * 8


def _of_sizes_that_fit(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind queries and keys change no score, and those behind values come out as zeros, to be cut off."""
    size = size_that_fits(query.shape[3], value.shape[3])
    query, key, value = (t if t.shape[3] == size else F.pad(t, (0, size - t.shape[3])) for t in (query, key, value))
    return query, key, value


def _attend(
    package: Package,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    sequences: Sequences | None,
    options: Options,
    sinks: Tensor | None,
) -> Tensor:
    """One call; `sinks` [h] are those that the package has no place for."""
    if sinks is None:
        return call(package, query, key, value, pattern, sequences, options)[0]
    out, lse = call(package, query, key, value, pattern, sequences, options, lse=True)
    assert lse is not None
    lse = lse.movedim(-1, -2)  # [B, Sq, h], [Tq, h]: the order of the output
    lse = _LogSumExp.apply(lse, query, key, package, pattern, sequences, options.scale)  # type: ignore[no-untyped-call]  # torch has no types for it
    left = torch.sigmoid(lse - sinks)
    return (out * left[..., None]).to(out.dtype)


class _LogSumExp(torch.autograd.Function):
    """The log-sum-exps of the scores, as they are, with their gradients for queries and keys."""

    @staticmethod
    def forward(
        ctx: Any,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        package: Package,
        pattern: Pattern,
        sequences: Sequences | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.package, ctx.pattern, ctx.sequences, ctx.scale = package, pattern, sequences, scale
        return lse.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, down: Tensor) -> tuple[Tensor | None, ...]:
        query, key = (tensor.detach() for tensor in ctx.saved_tensors)
        values = key.clone().requires_grad_()
        scaled = ctx.scale * down[..., None]
        with torch.enable_grad():
            mean, _ = call(ctx.package, query, key, values, ctx.pattern, ctx.sequences, Options(ctx.scale))
        (keys,) = torch.autograd.grad(mean, values, (scaled * query).to(query.dtype))
        return None, (scaled * mean).to(query.dtype), keys, None, None, None, None
