"""Kernels `transformers:<key>`: the attention functions that transformers itself knows.

They get the mask as a tensor, in the form that transformers would have given it for that key. A model's own
`eager_attention_forward` is asked for a softcap or sinks only if it has them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sp_attention.errors import UnsupportedError
from sp_attention.kernels.eager import eager_functions
from sp_attention.kernels.half_precision import in_half_on_cuda, refused_if_wrong, torchs_choice
from sp_attention.kernels.hookspecs import hookimpl
from sp_attention.kernels.request import Backend, Mask, Request

# Keys whose function takes the whole mask as one tensor, so that nothing of the mask can get lost on the way.
TENSOR_MASKS = ("eager", "sdpa")
# The names under which eager functions of models take attention sinks, or read them from the module.
SINKS = ("s_aux", "sinks")
# Dtypes in which the softmax over the lowest number everywhere is a number.
_WITH_A_MEAN = (torch.float32, torch.bfloat16)


@hookimpl
def sp_attention_backends() -> list[Backend]:
    # Kernels of the Hub, whose keys are repositories, are offered by sp-attention-flash, which knows their functions.
    keys = {"eager", *(key for key in ALL_ATTENTION_FUNCTIONS if "/" not in key)}
    return [_backend(key) for key in sorted(keys) if not key.startswith(("paged|", "sp_attention"))]


def _backend(key: str) -> Backend:
    kernel = f"transformers:{key}"
    if key == "eager":
        return Backend(
            "any",
            kernel,
            eager,
            refuses=refuses_eager,
            attend_with_weights=eager_with_weights,
            own_where_blind=True,
        )
    if key == "sdpa":
        return Backend("any", kernel, sdpa, refuses=refuses_sdpa)
    reason = "its mask does not travel as a tensor: use sdpa, transformers:eager, or flash of sp-attention-flash"
    return Backend("any", kernel, _unused, unavailable=reason)


def _unused(request: Request) -> Tensor:
    raise UnsupportedError("this kernel is listed as unavailable")


def refuses_sdpa(request: Request) -> str | None:
    """The reason why transformers' sdpa function cannot do this exactly, None when it can."""
    if request.softcap is not None:
        return "transformers' sdpa attention has no softcap"
    if request.sinks is not None:
        return "transformers' sdpa attention has no attention sinks"
    if request.query.device.type == "npu":
        # It makes a bool of an additive mask there, and leaves queries that see nothing to the operator.
        return "transformers' sdpa attention hands on to an NPU another mask than it is given; npu and sdpa do not"
    if in_half_on_cuda(request) and torch.is_grad_enabled():
        return refused_if_wrong("transformers:sdpa", kind(request), request)
    return None


def kind(request: Request) -> str | None:
    """What torch is given a mask tensor for by transformers' sdpa function; None where it is given none."""
    if request.bias is not None:
        return "bias"
    mask = request.mask
    further = (mask.window, mask.documents, mask.padding, mask.function, mask.explicit)
    later = mask.causal and (mask.offset or mask.query_length != mask.key_length)
    return "mask" if later or any(condition is not None for condition in further) else None


def sdpa(request: Request) -> Tensor:
    """transformers' sdpa function; see `Backend.attend`."""
    mask, seen, blind = request.mask, None, None
    if kind(request) is not None:
        # Kernels differ in what they give queries that see nothing, so these see all, and what they give is hidden.
        seen, blind = mask.once("transformers:sdpa visible", lambda: _visible(mask))
        seen = seen if request.bias is None else torch.where(seen, request.bias.to(request.query.dtype), float("-inf"))
    with torchs_choice("transformers:sdpa", kind, request):
        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            HeadView(request, request.query.shape[2] // request.key.shape[2]),
            *(tensor.transpose(1, 2) for tensor in (request.query, request.key, request.value)),
            seen,
            scaling=request.scale,
            dropout=request.dropout,
            is_causal=mask.causal,
        )
    result: Tensor = out if blind is None else out.masked_fill(blind.transpose(1, 2), 0.0)
    return result


def _visible(mask: Mask) -> tuple[Tensor, Tensor]:
    """[1|B, 1|h, Sq, Sk], what queries see, all keys where it is none; [1|B, 1|h, Sq, 1], which these queries are."""
    allowed = mask.dense()
    blind = ~allowed.any(-1, keepdim=True)
    return allowed | blind, blind


def refuses_eager(request: Request) -> str | None:
    """The reason why the model's own eager function cannot do this exactly, None when it can."""
    function, name = next(eager_functions(request.module), None), type(request.module).__name__
    if function is None:
        return f"{name} has no eager_attention_forward in its module"
    if request.softcap is not None and "softcap" not in inspect.signature(function).parameters:
        return f"the eager attention of {name} has no softcap"
    read = _names_read(function)
    takes_sinks = any(sink in inspect.signature(function).parameters for sink in SINKS) or "sinks" in read
    if request.sinks is not None and not takes_sinks:
        return f"the eager attention of {name} has no attention sinks"
    view = HeadView(request, 1)
    for attribute in sorted(read):
        try:
            getattr(view, attribute, None)
        except UnsupportedError as error:
            return str(error)
    return None


def eager(request: Request) -> Tensor:
    """The model's own `eager_attention_forward`; see `Backend.attend`."""
    return eager_with_weights(request)[0]


def eager_with_weights(request: Request) -> tuple[Tensor, Tensor]:
    """The model's own `eager_attention_forward`; see `Backend.attend_with_weights`."""
    function = next(eager_functions(request.module), None)
    assert function is not None
    parameters = inspect.signature(function).parameters
    options: dict[str, Any] = {} if request.softcap is None else {"softcap": request.softcap}
    if request.sinks is not None:
        options |= {name: request.sinks for name in SINKS if name in parameters}
    # Not every eager function repeats KV heads for their groups.
    repeats = request.query.shape[2] // request.key.shape[2]
    key, value = (
        tensor if repeats == 1 else tensor.repeat_interleave(repeats, 2) for tensor in (request.key, request.value)
    )
    additive, blind = _added_to_scores(request)
    out, weights = function(
        HeadView(request, 1),
        *(tensor.transpose(1, 2) for tensor in (request.query, key, value)),
        additive,
        scaling=request.scale,
        dropout=request.dropout,
        **options,
    )
    if blind is not None:
        out, weights = out.masked_fill(blind.transpose(1, 2), 0.0), weights.masked_fill(blind, 0.0)
    return out, weights


def _added_to_scores(request: Request) -> tuple[Tensor | None, Tensor | None]:
    """Mask and bias [1|B, 1|h, Sq, Sk], and [1|B, 1|h, Sq, 1] which queries see nothing; None for what changes nothing.

    What is hidden has the lowest finite number, as in transformers, so that queries that see nothing get the mean of
    all values; text is generated from such queries where a prompt is padded on its right. In float64 that number is
    infinite in the softmax of most models, which is in float32, and in float16 as soon as a score is added: there these
    queries get all keys, and it is for the caller to put zeros in place of what they yield.
    """
    mask, bias, dtype = request.mask, request.bias, request.query.dtype

    def derive() -> tuple[Tensor | None, Tensor | None]:
        if dtype in _WITH_A_MEAN:
            return None if bool((allowed := mask.dense()).all()) else allowed, None
        visible, blind = _visible(mask)
        return None if bool(visible.all()) else visible, blind if bool(blind.any()) else None

    visible, blind = mask.once(("transformers:eager visible", dtype in _WITH_A_MEAN), derive)
    if visible is None:
        return None if bias is None else bias.to(dtype), blind
    if bias is not None:
        return torch.where(visible, bias.to(dtype), torch.finfo(dtype).min), blind

    def add() -> Tensor:
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)

    return mask.once(("transformers:eager", dtype), add), blind


def _names_read(function: Callable[..., Any]) -> set[str]:
    """Every attribute that a function's code mentions, those of its module among them."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set(code.co_names) if code is not None else set()


class HeadView:
    """The attention module as transformers' functions see it: with the heads of the request only.

    A tensor of the module with one dim of all heads is cut to those of the request; gradients go to the whole. The
    sinks of a request stand for the module's. Nothing tells how to cut another tensor, or a submodule with parameters.
    """

    def __init__(self, request: Request, groups: int) -> None:
        self._request = request
        self.num_key_value_groups = groups
        # Models ask for no dropout outside of training; the functions ask the module again.
        self.training = request.dropout > 0

    def __getattr__(self, name: str) -> Any:
        module, heads, all_heads = self._request.module, self._request.heads, self._request.all_heads
        if name == "sinks" and self._request.sinks is not None:
            return self._request.sinks
        value = getattr(module, name)
        if heads is None or len(heads) == all_heads:
            return value
        if isinstance(value, Tensor):
            dims = [dim for dim, size in enumerate(value.shape) if size == all_heads]
            if len(dims) == 1:
                return value.narrow(dims[0], heads.start, len(heads))
            raise UnsupportedError(
                f"the eager attention of {type(module).__name__} reads the tensor {name!r} {list(value.shape)} from "
                f"the module, which holds all {all_heads} heads, and which dim is theirs is not known"
            )
        if isinstance(value, nn.Module) and any(True for _ in value.parameters()):
            raise UnsupportedError(
                f"the eager attention of {type(module).__name__} uses the submodule {name!r}, whose parameters may be "
                "of all heads"
            )
        return value
