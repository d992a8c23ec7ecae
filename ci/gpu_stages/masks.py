"""Stage masks: torch's attention in half precision with each kind of mask, by each of its backends and as it chooses.

Compared are the output and every gradient with attention written out in float64 on the same device, allowed is twice
the error that attention written out has in the same dtype. Each is run with the gradient of the output in two layouts,
since cuDNN's plans were found to keep that of the case before.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_stages import machine
from gpu_stages.results import CANNOT, FAILED, RIGHT, WRONG, Results, told
from gpu_stages.shape import Shape
from sp_attention.kernels import cudnn, sdpa, transformers
from sp_attention.kernels.reference import attend, moved, noise, results_of
from sp_attention.kernels.request import Mask, Request

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# The tables, and the backends of torch's in each. "chosen" is what is in use: all but cuDNN's.
WITHOUT, WITH = "Without cuDNN", "With cuDNN"
BACKENDS: dict[str, dict[str, SDPBackend | None]] = {
    WITHOUT: {
        "chosen": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
    WITH: {"cudnn": SDPBackend.CUDNN_ATTENTION, "any": None},
}
# Our kernels, and the functions of theirs that call torch.
KERNELS = {"sdpa": (sdpa, sdpa.attend), "transformers:sdpa": (transformers, transformers.sdpa)}
# Where attention written out happens to be exact, kernels still round.
LEAST = 1e-3


SHAPES = (
    Shape(2, 137, 4, 2, 64),
    Shape(2, 600, 4, 2, 128),
    Shape(1, 2048, 4, 4, 256),
    Shape(1, 4096, 4, 2, 128),
    Shape(1, 8192, 2, 1, 64),
)
REHEARSED = (Shape(2, 37, 4, 2, 16), Shape(1, 137, 2, 2, 64))


def _mask(shape: Shape, queries: int | None = None, **conditions: object) -> Mask:
    length = shape.length if queries is None else queries
    offset = shape.length - length
    return Mask(shape.batch, length, shape.length, torch.device("cpu"), offset=offset, **conditions)  # type: ignore[arg-type]


def _documents(shape: Shape) -> Tensor:
    edges = torch.tensor([shape.length // 3, shape.length // 2, shape.length - 5])
    return torch.bucketize(torch.arange(shape.length), edges, right=True).expand(shape.batch, -1)


def _padding(shape: Shape) -> Tensor:
    places = torch.arange(shape.length)
    rows = (places >= shape.length // 3, places < shape.length - shape.length // 5)
    return torch.stack([rows[row % 2] for row in range(shape.batch)])


def _holes(shape: Shape) -> Tensor:
    return noise(shape.batch, shape.length) > -0.5


def _bias(shape: Shape, heads: int = 1) -> Tensor:
    return noise(1, heads, shape.length, shape.length)


def _prefix(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) | (key < 11)


def _window(shape: Shape) -> int:
    """That which was wrong on an H200, where a sequence is longer than it."""
    return 100 if shape.length > 100 else 7


# What is run, by name: the mask of a shape, and what a request has besides.
CASES: dict[str, Callable[[Shape], tuple[Mask, dict[str, Tensor]]]] = {
    "causal": lambda s: (_mask(s), {}),
    "window": lambda s: (_mask(s, window=_window(s)), {}),
    "window, both sides": lambda s: (_mask(s, causal=False, window=_window(s)), {}),
    "window, documents": lambda s: (_mask(s, window=_window(s), documents=_documents(s)), {}),
    "window, padding": lambda s: (_mask(s, window=_window(s), padding=_padding(s)), {}),
    "documents": lambda s: (_mask(s, documents=_documents(s)), {}),
    "padding": lambda s: (_mask(s, padding=_padding(s)), {}),
    "holes": lambda s: (_mask(s, padding=_holes(s)), {}),
    "prefix": lambda s: (_mask(s, causal=False, function=_prefix), {}),
    "bias": lambda s: (_mask(s, causal=False), {"bias": _bias(s)}),
    "bias by head, padding": lambda s: (_mask(s, padding=_padding(s)), {"bias": _bias(s, s.heads)}),
    "sinks": lambda s: (_mask(s), {"sinks": noise(s.heads)}),
    "sinks, window": lambda s: (_mask(s, window=_window(s)), {"sinks": noise(s.heads)}),
    "sinks, holes": lambda s: (_mask(s, padding=_holes(s)), {"sinks": noise(s.heads)}),
    "later queries": lambda s: (_mask(s, queries=s.length // 3), {}),
    "later queries, sinks": lambda s: (_mask(s, queries=s.length // 3), {"sinks": noise(s.heads)}),
}


def run(results: Results, device: torch.device) -> None:
    results.note(" ".join((__doc__ or "").split()))
    shapes = REHEARSED if machine.is_stand_in(device) else SHAPES
    results.facts["lengths of masks"] = len(shapes)  # below which there is no verdict
    for table, shape, dtype, case, kernel in _order(shapes):
        key = {"kernel": kernel, "dtype": dtype, "case": case, "tokens": str(shape.length)}
        results.row(table, key, partial(_measured, table, shape, dtype, case, kernel, device))


def _measured(table: str, shape: Shape, dtype: str, case: str, kernel: str, device: torch.device) -> dict[str, str]:
    return outcomes(table, kernel, *_asked(case, shape, DTYPES[dtype], device))


def _order(shapes: tuple[Shape, ...]) -> Iterator[tuple[str, Shape, str, str, str]]:
    """What matters first: without cuDNN before with it, the short before the long."""
    for table in BACKENDS:
        for shape in shapes:
            for dtype in DTYPES:
                for case in CASES:
                    for kernel in KERNELS:
                        if kernel == "sdpa" or "sinks" not in case:  # which transformers' function has not
                            yield table, shape, dtype, case, kernel


@cache
def _asked(
    case: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Request, dict[str, Tensor], dict[str, float]]:
    """A request, what is expected of it, and the errors that are allowed. Computed once for all that it is asked of."""
    _asked.cache_clear()  # the tensors of one case at a time
    mask, features = CASES[case](shape)

    def tensor(length: int, heads: int) -> Tensor:
        # Strided as the exchange hands them over.
        return noise(length, shape.batch, heads, shape.size).transpose(0, 1)

    query, key = tensor(mask.query_length, shape.heads), tensor(shape.length, shape.kv_heads)
    exact = Request(query, key, key.flip(1) * 0.7, mask, shape.size**-0.5, **features)  # type: ignore[arg-type]
    asked = moved(exact, device, dtype)
    # From what is left in the dtype, so that rounding of what goes in counts for neither.
    expected = results_of(attend, moved(asked, device, torch.float64))
    own = results_of(attend, asked)
    return asked, expected, {name: 2 * _error(own[name], expected[name]) for name in expected}


def outcomes(
    table: str, kernel: str, asked: Request, expected: dict[str, Tensor], allowed: dict[str, float]
) -> dict[str, str]:
    """By backend what came of it, and what torch was given a mask for."""
    module, function = KERNELS[kernel]
    found = {"kind": module.kind(asked) or "none"}
    for name, backend in BACKENDS[table].items():
        with patch.object(module, "torchs_choice", partial(_only, backend, table)):
            found[name] = _outcome(function, asked, expected, allowed)
    return found


def _only(backend: SDPBackend | None, table: str, *_: object) -> AbstractContextManager[None]:
    if backend is not None:
        return sdpa_kernel([backend])
    return cudnn.without_cudnn() if table == WITHOUT else nullcontext()


def _outcome(
    function: Callable[[Request], Tensor], asked: Request, expected: dict[str, Tensor], allowed: dict[str, float]
) -> str:
    """Right or wrong, in the worst of two layouts of the output's gradient; or that torch's backend does not do it."""
    worst = ""
    for by_heads in (False, True):
        try:
            found = results_of(function, asked, by_heads)
        except RuntimeError as problem:
            if "vailable kernel" in str(problem) or "viable backend" in str(problem):
                return f"{CANNOT}: torch has no such kernel for it"
            if "CUDA error" in str(problem):
                raise
            return f"{FAILED}: {told(problem)}"
        for name, bound in allowed.items():
            error = _error(found[name], expected[name])
            if not error <= max(bound, LEAST):
                worst = worst or f"{WRONG}: {name} is off by {error:.1e}, more than {max(bound, LEAST):.1e}"
    return worst or RIGHT


def _error(result: Tensor, expected: Tensor) -> float:
    """As `reference.relative_error`, but on the device: a bias of 8,192 tokens has a gradient of 67 million numbers."""
    return float((result.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
