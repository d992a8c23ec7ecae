"""What kernels are compared with: attention written out, and how far a result is off."""

import torch
from torch import Tensor

from sp_attention.kernels.request import Request


def attend(request: Request) -> Tensor:
    """softmax(scale · QKᵀ, capped, + bias, over the keys that the mask allows and the sink) V, as it is written.

    See `Backend.attend`. No dropout.
    """
    return attend_with_weights(request)[0]


def attend_with_weights(request: Request) -> tuple[Tensor, Tensor]:
    """`attend`, and its weights [B, h, Sq, Sk]."""
    repeats = request.query.shape[2] // request.key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, 2) for tensor in (request.key, request.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", request.query, key) * request.scale
    if request.softcap is not None:
        scores = request.softcap * (scores / request.softcap).tanh()
    if request.bias is not None:
        scores = scores + request.bias
    allowed = request.mask.dense().expand_as(scores)
    highest = scores.detach().masked_fill(~allowed, float("-inf")).amax(-1, keepdim=True)
    if request.sinks is not None:
        sinks = request.sinks[None, :, None, None]
        highest = torch.maximum(highest, sinks.detach())
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    shares = torch.where(allowed, scores - highest, float("-inf")).exp()
    total = shares.sum(-1, keepdim=True)
    if request.sinks is not None:
        total = total + (sinks - highest).exp()
    weights = shares / total.masked_fill(total == 0, 1.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value), weights


def relative_error(result: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """The largest difference, as a part of the largest number that is expected, or of `scale`; NaN where there is one.

    Two tensors of one shape, on any devices and in any dtypes; computed in float64.
    """
    result, expected = (tensor.detach().cpu().double() for tensor in (result, expected))
    largest = expected.abs().max().clamp_min(1e-300) if scale is None else scale
    return float((result - expected).abs().max() / largest)
