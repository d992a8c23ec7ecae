"""Mixer functions that modules of a layer call, and their forwards that call ours in place of them.

On this rank's span a function is run by heads, or with the columns before the span; on whole tensors it is the model's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sp_attention.mixers.call import Call, positional_names
from sp_attention.mixers.declared import Convolution, Fused, Mixer, Scan
from sp_attention.mixers.exchange import run_alone, run_shared
from sp_attention.mixers.rebinding import globals_of, rebound
from sp_attention.region import direct_call
from sp_attention.region.context import Context

# Runs a call of a mixer function in its place.
Run = Callable[[Mixer, Call], Any]


@dataclass(frozen=True)
class MixerCalls:
    """A module whose forward, that of its class, calls mixer functions, by the names that it has for them."""

    module: nn.Module
    mixers: Mapping[str, Mixer]


def calls_in(part: nn.Module, known: Mapping[str, Mixer]) -> tuple[MixerCalls, ...]:
    """The modules in a part of a layer that call mixer functions that are `known` by name, as far as can be seen."""
    found = []
    for module in part.modules():
        if "forward" in vars(module):
            continue  # What others have put there may be made of anything.
        read = globals_of(type(module).forward)
        mixers = {name: known[name] for name, one in read.items() if name in known and _tells_names(one)}
        if not all(isinstance(mixer, Fused) for mixer in mixers.values()):
            found.append(MixerCalls(module, mixers))
    return tuple(found)


def told_of_mixers(several: tuple[MixerCalls, ...]) -> str:
    """What these are, as text for people."""
    mixers = [mixer for calls in several for mixer in calls.mixers.values()]
    scans = dict.fromkeys(mixer.name for mixer in mixers if isinstance(mixer, Scan))
    convolutions = dict.fromkeys(mixer.name for mixer in mixers if isinstance(mixer, Convolution))
    how = "head-parallel" if scans else "on this rank's tokens"
    return f"{how} ({', '.join((*scans, *convolutions))})"


def put_in_place(calls: MixerCalls, context: Context) -> None:
    """Give a module a forward of its own that calls ours, which looks at `context` for whose tokens these are."""

    def run(mixer: Mixer, call: Call) -> Any:
        stack_pass = context.stack_pass
        if stack_pass is None or not stack_pass.is_shared or stack_pass.peers.is_alone:
            return call.run()
        return run_shared(mixer, call, stack_pass.extent.length, stack_pass.peers)

    # A compiled model runs them as they are.
    forward = _forward_with(calls, torch.compiler.disable(run))
    direct_call.mark(forward)
    calls.module.__dict__["forward"] = MethodType(forward, calls.module)


def run_by_tokens(calls: MixerCalls, look: Callable[[nn.Module, Mapping[str, Tensor]], None]) -> None:
    """Give a module a forward that does nothing but of each token alone; `look` sees what mixer functions are given."""

    def run(mixer: Mixer, call: Call) -> Any:
        return run_alone(mixer, call, partial(look, calls.module))

    calls.module.forward = MethodType(_forward_with(calls, run), calls.module)


def take_away(calls: MixerCalls) -> None:
    """Give back the forward of its class, unless others have wrapped ours since: then it stays, and only passes on."""
    direct_call.take_away(calls.module)


def _forward_with(calls: MixerCalls, run: Run) -> Any:
    own = type(calls.module).forward
    read = globals_of(own)
    forward = rebound(own, {name: _in_place_of(read[name], mixer, run) for name, mixer in calls.mixers.items()})
    forward.__module__ = __name__  # by which it is known for one of ours
    return forward


def _in_place_of(function: Callable[..., Any], mixer: Mixer, run: Run) -> Callable[..., Any]:
    names = positional_names(function)

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return run(mixer, Call(function, names, args, kwargs))

    return called


def _tells_names(function: Any) -> bool:
    """Whether the arguments of a function can be told apart by name."""
    try:
        positional_names(function)
    except (TypeError, ValueError):
        return False
    return True
