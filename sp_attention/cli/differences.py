"""How far this rank's numbers are from those of one process, of which they may be a span."""

import torch
import torch.distributed as dist
from torch import Tensor

from sp_attention.distributed.partition import spans
from sp_attention.testing import relative_error

# What is compared of a gradient is at least this part of the largest gradient of the model: less is rounding.
NOISE = 1e-3

Values = dict[str, Tensor]


def largest_error(values: Values, expected: Values) -> tuple[float, str]:
    """The largest relative error of a rank's values, and of which value; infinite where one is missing or not finite.

    Relative to the largest of all numbers of a value in one process, and only where those are finite.
    """
    gradients = [value[value.isfinite()] for name, value in expected.items() if name.startswith("gradient of ")]
    noise = NOISE * max([value.abs().max().item() for value in gradients if value.numel()], default=0.0)
    worst, where = 0.0, "loss"
    for name in sorted(expected.keys() | values.keys(), key=lambda name: (name != "loss", name)):
        of_gradient = name.startswith("gradient of ")
        if name in expected and name in values:
            is_cut = "hidden_states." in name and values[name].shape != expected[name].shape  # they are promised whole
            error = error_of(values[name], expected[name], noise if of_gradient else 0.0)
            error = float("inf") if is_cut else error
        else:  # a gradient that is nowhere may as well be zero
            alone = values.get(name, expected.get(name))
            error = 0.0 if of_gradient and alone is not None and alone.abs().max() <= noise else float("inf")
        if error is not None and not error <= worst:
            worst, where = error if error == error else float("inf"), name
    return worst, where


def error_of(value: Tensor, expected: Tensor, noise: float = 0.0) -> float | None:
    """How far a tensor, whole or this rank's span of it, is from the whole; None when nothing can be compared.

    Relative to the largest number of the whole, or to `noise` where that is larger.
    """
    matching = matching_part(expected, value.shape)
    if matching is None:
        return float("inf")
    finite = matching.isfinite()
    if not finite.any():
        return None
    scale = max(expected[expected.isfinite()].abs().max().item(), noise) or 1.0
    return relative_error(value[finite], matching[finite], scale)


def matching_part(whole: Tensor, shape: torch.Size) -> Tensor | None:
    """Of a whole tensor what has this shape on this rank: all, its span of the one dim that is cut, or None.

    A dim that holds batch and sequence in one, [B·S, ...], is cut in every row of the batch.
    """
    if whole.shape == shape:
        return whole
    if whole.dim() != len(shape):
        return None
    cut = [dim for dim in range(whole.dim()) if whole.shape[dim] != shape[dim]]
    if len(cut) != 1:
        return None
    rank, ranks, dim = dist.get_rank(), dist.get_world_size(), cut[0]
    for rows in (1, 2):
        length, rest = divmod(whole.shape[dim], rows)
        span = spans(length, ranks)[rank]
        if not rest and rows * (span.stop - span.start) == shape[dim]:
            apart = whole.unflatten(dim, (rows, length))
            part: Tensor = apart.narrow(dim + 1, span.start, span.stop - span.start).flatten(dim, dim + 1)
            return part
    return None
