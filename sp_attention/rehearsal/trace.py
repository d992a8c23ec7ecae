"""Tiny forwards that are recorded: the calls of every module in them. A model is left as it was."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sp_attention.distributed.sharded_params import is_partitioned
from sp_attention.errors import UnsupportedError
from sp_attention.region.pytree import tensors
from sp_attention.rehearsal.dummy_inputs import DummyBatch

# Largest difference, relative to the largest number, of two computations of the same thing: the order of sums
# differs, and models compute parts in float32 whatever their dtype.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 5e-2

# Numbers in the gradients that are compared.
COMPARED = 2**18


@dataclass(frozen=True)
class AttentionCall:
    """One call of our attention function: by which module, [B, S] of its queries and of its keys, and their heads."""

    module: nn.Module
    queries: tuple[int, int]
    keys: tuple[int, int]
    heads: tuple[int, int]


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: its arguments as (args, kwargs), its output, and its place among all calls."""

    inputs: Any
    output: Any
    order: int


@dataclass(frozen=True)
class Trace:
    """A forward on one dummy batch: its output, the calls of every module, and those of our attention function."""

    dummy: DummyBatch
    output: Any
    calls: Mapping[nn.Module, list[ModuleCall]]
    attention_calls: list[AttentionCall]


# A narrow and a wide run of each kind of dummy batch.
Traces = list[tuple[Trace, Trace]]


def _just_called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run what is inside without gradients or checkpointing; modes, buffers and random numbers stay as they were."""
    training = {module: module.training for module in model.modules()}
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    wrapped = [(module, module.checkpoint_fn) for module in model.modules() if isinstance(module, CheckpointWrapper)]
    randomness = random.getstate()
    device = next(model.parameters()).device
    fork = {} if device.type in ("cpu", "meta") else {"devices": [device], "device_type": device.type}
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]  # a flag, not a module
        for wrapper, _ in wrapped:
            wrapper.checkpoint_fn = _just_called  # type: ignore[assignment]  # a partial of torch's checkpoint else
        with torch.no_grad(), torch.random.fork_rng(**{"devices": [], **fork}), same_buffers(model):
            yield
    finally:
        random.setstate(randomness)
        for module, mode in training.items():
            module.training = mode
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]  # a flag, not a module
        for wrapper, checkpoint in wrapped:
            wrapper.checkpoint_fn = checkpoint


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever is inside leaves the buffers as they are, such as the running means of a batch normalisation."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.device.type != "meta" and not torch.equal(buffer, before):
                    buffer.copy_(before)


def record(
    model: nn.Module,
    dummy: DummyBatch,
    attention_calls: list[AttentionCall],
    prove: Callable[[nn.Module, ModuleCall], None] | None = None,
) -> Trace:
    """A forward that records the calls of all modules; our attention function appends its own to `attention_calls`.

    `prove` is told of each call right after it, while an engine that shards parameters still has them gathered.
    """
    # Modules that a forward puts in the place of others were not called.
    calls: dict[nn.Module, list[ModuleCall]] = defaultdict(list, {module: [] for module in model.modules()})
    attention_calls.clear()
    count = 0
    proving = False

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal proving, count
        if proving:
            return
        count += 1
        called = ModuleCall((args, dict(kwargs)), output, count)
        calls[module].append(called)
        if prove is not None:
            proving = True
            prove(module, called)
            proving = False

    handles = [module.register_forward_hook(after, with_kwargs=True) for module in [*calls]]
    try:
        output = model(**dummy.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(dummy, output, calls, list(attention_calls))


def same(left: Any, right: Any) -> bool:
    """Whether two outputs hold the same numbers, up to the order of sums."""
    ours, theirs = dict(tensors(left)), dict(tensors(right))
    return ours.keys() == theirs.keys() and all(_close(ours[path], theirs[path]) for path in ours)


def _close(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    # Whatever is not finite in the reference has no value to compare with.
    finite = torch.isfinite(right)
    if not finite.any():
        return True
    tolerance = _TOLERANCE.get(right.dtype, _LOW_PRECISION_TOLERANCE)
    left, right = left[finite].double(), right[finite].double()
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


def require_same(output: Any, expected: Any, what: str) -> None:
    if not same(output, expected):
        raise UnsupportedError(f"{what} gives other numbers than the model on its own")


def with_gradients(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """A model's output, and the gradients of some number made of it with respect to its small parameters, in a row.

    Small, so that they take no memory, while the path to them leads through all of the model. There are none where an
    engine shards the parameters, since backward would set the engine to work.
    """
    parameters = [one for one in model.parameters() if one.requires_grad and one.is_floating_point()]
    ordered = sorted(parameters, key=Tensor.numel)
    totals = accumulate(map(Tensor.numel, ordered))
    small = [parameter for parameter, total in zip(ordered, totals, strict=True) if total <= COMPARED]
    sharded = any(isinstance(one, DTensor) or is_partitioned(one) for one in parameters)
    if not small or sharded or model.device.type == "meta":
        return model(**inputs), torch.zeros(0, device=model.device)
    with torch.enable_grad():
        output = model(**inputs)
        number = torch.zeros((), dtype=torch.float64, device=model.device)
        for _, tensor in tensors(output):
            if tensor.requires_grad:
                weights = torch.arange(tensor.numel(), device=tensor.device).cos().view(tensor.shape)
                number = number + torch.where(tensor.isfinite(), tensor, 0).mul(weights).double().sum()
        gradients = torch.autograd.grad(number, small, allow_unused=True)
    found = [
        torch.zeros_like(one) if gradient is None else gradient for one, gradient in zip(small, gradients, strict=True)
    ]
    return output, torch.cat([one.detach().to(model.dtype).flatten() for one in found])
