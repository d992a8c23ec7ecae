"""Checks of a kernel: it does what it is asked, feature by feature, or it refuses.

A plugin's own test is one line: `conform(backend, refused=("softcap",))`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sp_attention.kernels.reference import attend as attend
from sp_attention.kernels.reference import attend_with_weights as attend_with_weights
from sp_attention.kernels.reference import given, moved, noise, results_of, trained
from sp_attention.kernels.reference import relative_error as relative_error
from sp_attention.kernels.request import Backend, Mask, Request

BATCH, LENGTH = 2, 37
# The least that a tolerance is, by dtype: in float32 the order in which a kernel adds up changes as much.
LEAST = {torch.float64: 1e-9, torch.float32: 5e-6}
# Draws of dropout that a mean is taken of, and how many standard errors it may be off.
DRAWS, ERRORS = 400, 6.0
# What can come of a feature.
RIGHT, REFUSED, WRONG = "right", "refused", "wrong"


@dataclass(frozen=True)
class Shape:
    """Sizes of a small request; none of them is even where another would do."""

    query_length: int = LENGTH
    key_length: int = LENGTH
    heads: int = 3
    kv_heads: int = 3
    size: int = 8
    value_size: int = 8


def request(mask: Mask, shape: Shape | None = None, scale: float = 0.4, **features: Any) -> Request:
    """Random float64 queries, keys and values on the CPU, always the same; strided, as the exchange hands them over."""
    shape = shape or Shape()
    generator = torch.Generator().manual_seed(0)

    def tensor(length: int, heads: int, size: int) -> Tensor:
        return torch.randn(length, BATCH, heads, size, dtype=torch.float64, generator=generator).transpose(0, 1)

    query = tensor(shape.query_length, shape.heads, shape.size)
    key = tensor(shape.key_length, shape.kv_heads, shape.size)
    value = tensor(shape.key_length, shape.kv_heads, shape.value_size)
    return Request(query, key, value, mask, scale, **features)


def _mask(causal: bool = True, query_length: int = LENGTH, key_length: int = LENGTH, **conditions: Any) -> Mask:
    return Mask(BATCH, query_length, key_length, torch.device("cpu"), causal=causal, **conditions)


def _real(*rows: tuple[int, int], length: int = LENGTH) -> Tensor:
    places = torch.arange(length)
    return torch.stack([(places >= first) & (places < last) for first, last in rows])


def _documents() -> Tensor:
    rows = [9, 1, 27], [16, 20, 1]
    return torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in rows])


def _prefix(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    lengths = torch.tensor([5, 11], device=batch.device)
    return (key <= query) | (key < lengths[batch])


_LEFT, _RIGHT = _real((9, LENGTH), (0, LENGTH)), _real((0, 30), (3, 33))
_CHUNKS = (torch.arange(LENGTH) // 8).expand(BATCH, -1)
_HOLES = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7

# What a request can ask for, by name, and the smallest request that asks for it.
FEATURES: dict[str, Callable[[], Request]] = {
    "causal": lambda: request(_mask()),
    "bidirectional": lambda: request(_mask(causal=False)),
    "sliding window": lambda: request(_mask(window=7)),
    "sliding window on both sides": lambda: request(_mask(causal=False, window=7)),
    "chunks": lambda: request(_mask(documents=_CHUNKS)),
    "packed documents": lambda: request(_mask(documents=_documents())),
    "left padding": lambda: request(_mask(padding=_LEFT)),
    "right padding": lambda: request(_mask(padding=_RIGHT)),
    "padding between real tokens": lambda: request(_mask(padding=_HOLES)),
    "padding, bidirectional": lambda: request(_mask(causal=False, padding=_RIGHT)),
    "padding and nothing else in a row": lambda: request(_mask(padding=_real((0, 0), (5, LENGTH)))),
    "padding, sliding window": lambda: request(_mask(padding=_LEFT, window=7)),
    "right padding, sliding window": lambda: request(_mask(padding=_RIGHT, window=7)),
    "padding between real tokens, sliding window": lambda: request(_mask(padding=_HOLES, window=7)),
    "packed documents, window on both sides": lambda: request(_mask(causal=False, documents=_documents(), window=7)),
    "packed documents, sliding window": lambda: request(_mask(documents=_documents(), window=7)),
    "packed documents, padding": lambda: request(_mask(documents=_documents(), padding=_RIGHT)),
    "packed documents, bidirectional": lambda: request(_mask(causal=False, documents=_documents())),
    "any mask function (prefix-LM)": lambda: request(_mask(causal=False, function=_prefix)),
    "mask tensor": lambda: request(_mask(causal=False, explicit=noise(BATCH, 1, LENGTH, LENGTH) > 0)),
    "mask tensor by head": lambda: request(_mask(causal=False, explicit=noise(1, 3, LENGTH, LENGTH) > 0)),
    "mask tensor of keys": lambda: request(_mask(causal=False, explicit=noise(BATCH, 1, 1, LENGTH) > 0)),
    "additive bias": lambda: request(_mask(causal=False), bias=noise(BATCH, 1, LENGTH, LENGTH)),
    "additive bias by head": lambda: request(_mask(padding=_LEFT), bias=noise(1, 3, LENGTH, LENGTH)),
    "softcap": lambda: request(_mask(padding=_LEFT), softcap=1.5),
    "attention sinks": lambda: request(_mask(padding=_LEFT), sinks=noise(3)),
    "attention sinks, sliding window": lambda: request(_mask(window=7), sinks=noise(3)),
    "attention sinks, packed documents": lambda: request(_mask(documents=_documents()), sinks=noise(3)),
    "dropout": lambda: request(_mask(padding=_LEFT), dropout=0.3),
    "scale": lambda: request(_mask(), scale=0.05),
    "grouped KV heads": lambda: request(_mask(padding=_LEFT), Shape(heads=6)),
    "one KV head": lambda: request(_mask(window=7), Shape(heads=6, kv_heads=1)),
    "head size 20": lambda: request(_mask(), Shape(size=20, value_size=20)),
    "head size 512": lambda: request(_mask(), Shape(size=512, value_size=512), scale=0.05),
    "values larger than keys": lambda: request(_mask(), Shape(value_size=12)),
    "values smaller than keys": lambda: request(_mask(documents=_documents()), Shape(value_size=4)),
    "cross-attention": lambda: request(_mask(causal=False, query_length=11, padding=_RIGHT), Shape(query_length=11)),
    "last queries of a sequence": lambda: request(_mask(query_length=11, offset=26), Shape(query_length=11)),
    "later queries of a sequence": lambda: request(
        _mask(query_length=11, offset=17, window=7, documents=_documents()), Shape(query_length=11)
    ),
}


def _long(length: int, **conditions: Any) -> Request:
    return request(_mask(query_length=length, key_length=length, **conditions), Shape(length, length, 1, 1, 16, 16))


# The plainest masks at lengths where kernels go other ways than at `LENGTH`: over several tiles, or past a mask of 512.
LONG: dict[str, Callable[[], Request]] = {}
for _length in (137, 600, 4096):
    _sides = _real((_length // 3, _length), (0, _length - _length // 5), length=_length)
    LONG |= {
        f"causal, {_length} tokens": partial(_long, _length),
        f"padding on both sides, {_length} tokens": partial(_long, _length, padding=_sides),
        f"sliding window, {_length} tokens": partial(_long, _length, window=100),
    }


def request_for(
    feature: str, *, module: nn.Module | None = None, device: torch.device | str = "cpu", dtype: torch.dtype
) -> Request:
    """The request for one of `FEATURES` or `LONG`, on a device, with its float tensors in a dtype."""
    return moved(replace((FEATURES | LONG)[feature](), module=module), torch.device(device), dtype)


def check(
    backend: Backend,
    feature: str,
    *,
    module: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
) -> str | None:
    """Let a kernel do one of `FEATURES` or `LONG`: the reason if it refuses, None if it is right.

    Right is: the output, and the gradients of queries, keys, values, bias and sinks, are those of `attend` in float64,
    each to a relative error of `tolerance` (of the largest number), and so are the weights of `attend_with_weights`;
    queries that see nothing yield zeros, but for `own_where_blind`; nothing of the request is changed. Dropout is right
    if the mean and variance of many draws are, and backward has the draws of forward. AssertionError says what is not.

    module: the request's, for kernels that need one. dtype: what queries, keys, values, bias and sinks are given in.
    tolerance: by default 1e-9; in a lower precision than float64 twice the largest error of `attend` in that one, and
        at least 5e-6 in float32.
    """
    asked = request_for(feature, module=module, device=device, dtype=dtype)
    reason = backend.refuses(trained(asked))
    if reason is not None:
        return reason
    # On the CPU, since not every device has float64.
    exact = moved(asked, torch.device("cpu"), torch.float64)
    if asked.dropout:
        _check_dropout(backend, feature, asked, exact)
        return None
    expected = results_of(attend, exact)
    if tolerance is None:
        own = results_of(attend, asked)
        tolerance = max(
            LEAST.get(dtype, 0.0), 2 * max(relative_error(own[name], result) for name, result in expected.items())
        )
    before = _copies(asked)
    blind = ~asked.mask.dense().any(-1, keepdim=True)
    hidden = blind & backend.own_where_blind
    results = results_of(lambda request: backend.attend(request).masked_fill(hidden.transpose(1, 2), 0.0), asked)
    for name, result in results.items():
        _require_close(backend, feature, name, result, expected[name], tolerance)
    if bool(results["output"].transpose(1, 2).masked_select(blind).any()):
        raise AssertionError(f"{backend.kernel}, {feature}: queries that see no key yield something else than zeros")
    if backend.attend_with_weights is not None:
        out, given = backend.attend_with_weights(asked)
        out, given = out.masked_fill(hidden.transpose(1, 2), 0.0), given.masked_fill(hidden, 0.0)
        _require_close(backend, feature, "output beside weights", out, expected["output"], tolerance)
        _require_close(backend, feature, "weights", given, attend_with_weights(exact)[1], tolerance)
    for name, copy in _copies(asked).items():
        if not torch.equal(before[name], copy):
            raise AssertionError(f"{backend.kernel}, {feature}: the kernel has changed its request's {name}")
    return None


def outcome(backend: Backend, feature: str, **options: Any) -> tuple[str, str]:
    """What `check` with these options finds: `RIGHT`, `REFUSED` with the reason, or `WRONG` with what is wrong.

    Nothing is raised: a kernel that raises where it does not refuse is wrong.
    """
    try:
        reason = check(backend, feature, **options)
    except AssertionError as error:
        return WRONG, str(error).removeprefix(f"{backend.kernel}, {feature}: ")
    except Exception as error:  # it did not refuse, and did not do it
        return WRONG, f"{type(error).__name__}: {error}"
    return (RIGHT, "") if reason is None else (REFUSED, reason)


def conform(
    backend: Backend,
    refused: Collection[str] = (),
    *,
    module: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
) -> None:
    """Let a kernel do all of `FEATURES`: it must refuse those in `refused`, no others, and do all others right.

    The other arguments are those of `check`. AssertionError has a line for every feature of which that is not so;
    ValueError names what is in `refused` and no feature.
    """
    unknown = sorted(set(refused) - FEATURES.keys())
    if unknown:
        raise ValueError(f"no features: {', '.join(unknown)}. There are: {', '.join(FEATURES)}")
    found = {}
    for feature in FEATURES:
        came, text = outcome(backend, feature, module=module, device=device, dtype=dtype, tolerance=tolerance)
        if came == WRONG:
            found[feature] = text
        elif came == REFUSED and feature not in refused:
            found[feature] = f"refused, which it should not be: {text}"
        elif came == RIGHT and feature in refused:
            found[feature] = "done, though it should be refused"
    if found:
        width = max(map(len, found))
        lines = [f"    {feature:{width}}  {text}" for feature, text in found.items()]
        count = f"{len(found)} of {len(FEATURES)} features"
        raise AssertionError("\n".join([f"{backend.kernel} on {device}, {dtype}: {count} are not as said.", *lines]))


def _check_dropout(backend: Backend, feature: str, asked: Request, exact: Request) -> None:
    torch.manual_seed(0)
    draws = torch.stack([backend.attend(asked).detach().cpu().double() for _ in range(DRAWS)])
    expected, weights = attend_with_weights(exact)
    repeats = exact.query.shape[2] // exact.key.shape[2]
    values = exact.value.repeat_interleave(repeats, 2)
    # A weight w is kept with probability 1 - p and grows to w / (1 - p) then: its variance is w² p / (1 - p).
    spread = torch.einsum("bhqk,bkhd->bqhd", weights**2, values**2) * asked.dropout / (1 - asked.dropout)
    rounding = max(1e-6, 2 * float((attend(asked).cpu() - expected).abs().max()))
    off = float(((draws.mean(0) - expected).abs() - ERRORS * (spread / DRAWS).sqrt()).max())
    # Summed over all numbers of the output, chance makes this a tenth or so, and other variances make it near 1.
    variance = float((draws.var(0) - spread).abs().sum() / spread.sum())
    if off > rounding or not variance < 0.3:
        raise AssertionError(
            f"{backend.kernel}, {feature}: the mean of {DRAWS} draws is off by {off:.1e} more than chance explains, "
            f"and their variance by {variance:.0%}"
        )
    # For one draw the output is linear in the values, so their gradient gives the output back.
    value = asked.value.detach().requires_grad_()
    out = backend.attend(replace(asked, value=value))
    products = out * noise(*out.shape).to(out)
    (gradient,) = torch.autograd.grad(products.sum(), value)
    difference = float(((gradient * value).sum() - products.sum()).detach().abs() / products.detach().abs().sum())
    if difference > max(1e-6, torch.finfo(asked.value.dtype).eps):
        raise AssertionError(f"{backend.kernel}, {feature}: backward does not have the draws of forward")


def _copies(asked: Request) -> dict[str, Tensor]:
    """What of a request a kernel could change."""
    tensors = given(asked) | given(asked.mask) | {"mask": asked.mask.dense()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _require_close(backend: Backend, feature: str, name: str, result: Tensor, expected: Tensor, bound: float) -> None:
    if result.shape != expected.shape:
        raise AssertionError(
            f"{backend.kernel}, {feature}: {name} has shape {list(result.shape)}, not {list(expected.shape)}"
        )
    error = relative_error(result, expected)
    if not error <= bound:
        raise AssertionError(f"{backend.kernel}, {feature}: {name} is off by {error:.1e}, more than {bound:.1e}")
