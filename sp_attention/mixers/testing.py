"""Checks of a mixer: what is said of how a function's arguments are cut gives what the function gives for all of them.

In one process, which cuts as ranks do, and exchanges nothing. A plugin's own test is one line:
`conform(scan, function, arguments_of)`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_attention.distributed.partition import spans
from sp_attention.kernels.reference import relative_error
from sp_attention.mixers.call import Call, positional_names
from sp_attention.mixers.declared import Convolution, Scan
from sp_attention.mixers.exchange import ScanArguments, run_my_heads, tensor_of
from sp_attention.ulysses.head_plan import HeadPlan, head_plan


@dataclass(frozen=True)
class Shape:
    """What a function is to be tried with, and by how many ranks; `with_state`: an initial state, and the last one."""

    length: int = 33
    heads: int = 6
    groups: int = 3
    ranks: int = 2
    batch: int = 2
    with_state: bool = False


# What ranks may be up against, by name. Of convolutions, heads are channels.
FEATURES = {
    "one token": Shape(length=1, ranks=1),
    "fewer tokens than ranks need": Shape(length=4, ranks=3),
    "a length that ranks do not divide": Shape(),
    "several chunks": Shape(length=201),
    "whole chunks": Shape(length=128),
    "heads that ranks do not divide": Shape(heads=5, groups=1),
    "groups that two ranks share": Shape(heads=6, groups=3, ranks=4),
    "more ranks than groups": Shape(heads=6, groups=2, ranks=3),
    "more ranks than heads": Shape(heads=2, groups=1, ranks=3),
    "a group for each head": Shape(heads=4, groups=4, ranks=3),
    "one row": Shape(batch=1),
    "states": Shape(with_state=True),
    "states, more ranks than heads": Shape(heads=2, groups=2, ranks=3, with_state=True),
}
# Of the largest number: many functions compute in float32 whatever they are given.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 3e-2


def conform(
    mixer: Scan | Convolution,
    function: Callable[..., Any],
    arguments_of: Callable[[Shape], Mapping[str, Any] | None],
    *,
    skipped: Collection[str] = (),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """Let a function do all of `FEATURES` but those `skipped`, cut as declared for each of the ranks, and put together.

    arguments_of: named arguments of a shape, in float64 on the CPU; None where the function has no such thing. Outputs,
    last states, and the gradients of all floating arguments are compared with those of one call with all of them.
    AssertionError has a line for every feature that is not right.
    """
    found: dict[str, str] = {}
    for feature in FEATURES.keys() - set(skipped):
        given = arguments_of(FEATURES[feature])
        if given is not None:
            moved = {name: _moved(one, dtype, device) for name, one in given.items()}
            errors = _errors(mixer, function, FEATURES[feature], moved, TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE))
            found |= {feature: "; ".join(errors)} if errors else {}
    if found:
        lines = [f"    {feature}: {text}" for feature, text in sorted(found.items())]
        raise AssertionError("\n".join([f"{mixer.name}, {function.__name__}, {dtype}: not as declared.", *lines]))


def _moved(given: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    if not isinstance(given, Tensor):
        return given
    return given.to(device, dtype if given.is_floating_point() else given.dtype)


def _errors(
    mixer: Scan | Convolution, function: Callable[..., Any], shape: Shape, given: Mapping[str, Any], tolerance: float
) -> list[str]:
    def shared(call: Call) -> Any:
        if isinstance(mixer, Scan):
            return _scan_shared(mixer, call, shape.ranks)
        return _convolution_shared(mixer, call, shape.ranks)

    try:
        whole = results_of(Call.run, function, given)
        parts = results_of(shared, function, given)
    except Exception as error:  # whatever it raises where it is cut
        return [f"{type(error).__name__}: {error}"]
    errors = []
    for name, expected in whole.items():
        if parts[name].shape != expected.shape or parts[name].dtype != expected.dtype:
            errors.append(f"{name} is {parts[name].dtype} {list(parts[name].shape)}")
        elif not (off := relative_error(parts[name], expected)) <= tolerance:
            errors.append(f"{name} is off by {off:.1e}")
    return errors


def results_of(run: Callable[[Call], Any], function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a call returns, and the gradients of what it is given, by name."""
    trained = {
        name: one.detach().clone().requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one
        for name, one in given.items()
    }
    result = run(Call(function, positional_names(function), (), trained))
    several = result if isinstance(result, tuple) else (result,)
    named = zip(("the result", "the last state"), several, strict=False)
    outputs = {name: one for name, one in named if one is not None}
    number = torch.zeros((), dtype=torch.float64)
    for one in outputs.values():
        number = (
            number + (one * torch.arange(one.numel(), device=one.device).cos().view(one.shape)).double().sum().cpu()
        )
    wanted = {name: one for name, one in trained.items() if isinstance(one, Tensor) and one.requires_grad}
    gradients = torch.autograd.grad(number, list(wanted.values()), allow_unused=True)
    pairs = zip(wanted, gradients, strict=True)
    return {name: one.detach() for name, one in outputs.items()} | {
        f"the gradient of {name}": torch.zeros_like(wanted[name]) if one is None else one for name, one in pairs
    }


def _scan_shared(scan: Scan, call: Call, ranks: int) -> Any:
    """What ranks return for their heads, put together."""
    given = ScanArguments.of(scan, call)
    plan = head_plan(given.heads, given.groups, ranks)
    results = [run_my_heads(scan, call, given, _arriving(given, plan, rank), plan, rank) for rank in range(ranks)]
    if not isinstance(results[0], tuple):
        assert scan.result.heads is not None
        return torch.cat(results, scan.result.heads)
    outs, states = zip(*results, strict=True)
    assert scan.result.heads is not None
    if states[0] is None:
        return torch.cat(outs, scan.result.heads), None
    assert scan.state is not None
    assert scan.state.heads is not None
    return torch.cat(outs, scan.result.heads), torch.cat(states, scan.state.heads)


def _arriving(given: ScanArguments, plan: HeadPlan, rank: int) -> dict[str, Tensor]:
    """[B, S, H, D] of all tokens each → [B, S, h, D] of one rank's heads."""
    found = {}
    for name, (tensor, _) in given.with_tokens.items():
        cut = given.cuts[name]
        heads = (plan.query if cut.of == "query" else plan.kv)[rank]
        found[name] = tensor if cut.heads is None else tensor[:, :, heads.start : heads.stop]
        if cut.heads is None and not len(plan.query[rank]):
            found[name] = tensor[:, :, :0]
    return found


def _convolution_shared(convolution: Convolution, call: Call, ranks: int) -> Tensor:
    """What ranks return for their spans, put together."""
    name, whole = tensor_of(call, convolution.given)
    columns = tensor_of(call, convolution.weight)[1].shape[-1] - 1
    padded = torch.cat((whole.new_zeros(*whole.shape[:2], columns), whole), 2)
    parts = [
        call.with_others({name: padded[:, :, span.start : span.stop + columns]}).run()[:, :, columns:]
        for span in spans(whole.shape[2], ranks)
        if len(span)
    ]
    return torch.cat(parts, 2)
