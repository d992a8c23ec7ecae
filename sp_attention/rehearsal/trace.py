"""Tiny forwards that are recorded: the calls of every module in them. A model is left as it was."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import Context
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sp_attention.distributed import rng
from sp_attention.distributed.sharded_params import is_partitioned
from sp_attention.errors import UnsupportedError
from sp_attention.region.kept import Attributes, Buffers
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
    """Run what is inside without gradients or checkpointing; behind it the model and random numbers are as they were.

    Every forward of the model begins so too, unless it goes on from a cache: what forwards write into modules, and the
    random numbers that they draw, are no reason for which a sharded one differs from a whole one.
    """
    training = {module: module.training for module in model.modules()}
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    wrapped = [(module, module.checkpoint_fn) for module in model.modules() if isinstance(module, CheckpointWrapper)]
    randomness, of_numpy = random.getstate(), rng.numpy_state()
    device = next(model.parameters()).device
    fork = {} if device.type in ("cpu", "meta") else {"devices": [device], "device_type": device.type}
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]  # a flag, not a module
        for wrapper, _ in wrapped:
            wrapper.checkpoint_fn = _just_called  # type: ignore[assignment]  # a partial of torch's checkpoint else
        with _plain_mode(model), torch.random.fork_rng(**{"devices": [], **fork}), _each_forward_anew(model):
            yield
    finally:
        random.setstate(randomness)
        rng.set_numpy_state(of_numpy)
        for module, mode in training.items():
            module.training = mode
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]  # a flag, not a module
        for wrapper, checkpoint in wrapped:
            wrapper.checkpoint_fn = checkpoint


@contextmanager
def _plain_mode(model: nn.Module) -> Iterator[None]:
    """Within it gradients are off, and can be switched on, and nothing is cast, whatever is around enable()."""
    parameters = list(model.parameters())
    device = parameters[0].device.type
    autocast = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    # Parameters that were made in inference mode are of no use outside of it.
    with torch.inference_mode(any(one.is_inference() for one in parameters)), torch.no_grad(), autocast:
        yield


@contextmanager
def _each_forward_anew(model: nn.Module) -> Iterator[None]:
    """Within it each forward begins with the model's attributes, buffers and generators as at its first; so it ends."""
    attributes, buffers = Attributes.of(model), Buffers.of(model)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is None:
            attributes.restore()
            buffers.restore()
            rng.seed_all(0)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Backward may still need the buffers as they are, and a forward that goes on from a cache needs the attributes.
        if kwargs.get("past_key_values") is None and not kwargs.get("use_cache"):
            attributes.restore()

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        attributes.restore()
        buffers.restore()


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
            # In a context of its own: transformers' recorders of router logits, hidden states and weights, which the
            # configuration may have switched on, find out by a context variable whether they record.
            Context().run(prove, module, called)
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


def with_gradients(model: PreTrainedModel, inputs: Mapping[str, Any], of: str | None = None) -> tuple[Any, Tensor]:
    """A model's output, and the gradients of some number made of it with respect to its small parameters, in a row.

    of: the name of the output that the number is made of, by default all of them.
    Small, so that they take no memory, while the path to them leads through all of the model. There are none where an
    engine shards the parameters, since backward would set the engine to work, and none of parameters that were made in
    inference mode.
    """
    parameters = [one for one in model.parameters() if one.requires_grad and one.is_floating_point()]
    ordered = sorted(parameters, key=Tensor.numel)
    totals = accumulate(map(Tensor.numel, ordered))
    small = [parameter for parameter, total in zip(ordered, totals, strict=True) if total <= COMPARED]
    sharded = any(isinstance(one, DTensor) or is_partitioned(one) for one in parameters)
    if not small or sharded or model.device.type == "meta" or torch.is_inference_mode_enabled():
        return model(**inputs), torch.zeros(0, device=model.device)
    with torch.enable_grad():
        output = model(**inputs)
        number = torch.zeros((), dtype=torch.float64, device=model.device)
        for path, tensor in tensors(output):
            if tensor.requires_grad and (of is None or path[:1] == (of,)):
                weights = torch.arange(tensor.numel(), device=tensor.device).cos().view(tensor.shape)
                number = number + torch.where(tensor.isfinite(), tensor, 0).mul(weights).double().sum()
        gradients = torch.autograd.grad(number, small, allow_unused=True)
    found = [
        torch.zeros_like(one) if gradient is None else gradient for one, gradient in zip(small, gradients, strict=True)
    ]
    return output, torch.cat([one.detach().to(model.dtype).flatten() for one in found])
