"""What kernels are compared with: attention written out, and how far a result is off."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sp_attention.kernels.request import Mask, Request


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


def noise(*shape: int) -> Tensor:
    """Random numbers in float64 on the CPU, the same every time."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def given(owner: Request | Mask) -> dict[str, Any]:
    """The tensors of a request or a mask, by name."""
    values = {field.name: getattr(owner, field.name) for field in fields(owner)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def moved(request: Request, device: torch.device, dtype: torch.dtype) -> Request:
    """The request on a device, with its float tensors in a dtype; nothing that was derived from its mask goes along."""
    mask = replace(request.mask, device=device, **{name: t.to(device) for name, t in given(request.mask).items()})
    return replace(request, mask=mask, **{name: t.detach().to(device, dtype) for name, t in given(request).items()})


def trained(asked: Request) -> Request:
    """The request as in training: every tensor wants its gradient, so a kernel may refuse to give one of them."""
    return replace(asked, **{name: tensor.detach().requires_grad_() for name, tensor in given(asked).items()})


def results_of(function: Callable[[Request], Tensor], asked: Request, by_heads: bool = False) -> dict[str, Tensor]:
    """The output and the gradient of every tensor of a request.

    by_heads: the gradient of the output lies in memory as [B, h, Sq, Dv] and not as [B, Sq, h, Dv].
    """
    asked = trained(asked)
    inputs = given(asked)
    out = function(asked)
    down = noise(*out.shape).to(out)
    down = down.transpose(1, 2).contiguous().transpose(1, 2) if by_heads else down
    gradients = torch.autograd.grad(out, list(inputs.values()), down, allow_unused=True)
    found = {"output": out.detach()}
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return found
