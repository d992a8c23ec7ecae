"""Together with what torch puts around a model: DDP, FSDP2, its own activation checkpointing, autocast."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from models import MODELS, batch_of
from test_parity import relative_error
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sp_attention
from sp_attention.launch import run_ranks

Wrap = Callable[[nn.Module], nn.Module]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def checkpoint_by_torch(model: nn.Module, implementation: CheckpointImpl) -> nn.Module:
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(model, wrapper, lambda module: type(module).__name__.endswith("DecoderLayer"))
    if implementation is CheckpointImpl.REENTRANT:
        model.enable_input_require_grads()
    return model


def checkpointed_fsdp(model: nn.Module) -> nn.Module:
    return fsdp(checkpoint_by_torch(model, CheckpointImpl.NO_REENTRANT))


WRAPS: dict[str, tuple[Wrap, bool]] = {
    # Whether the wrap averages gradients itself.
    "ddp": (ddp, True),
    "fsdp2": (fsdp, True),
    "fsdp2-checkpointed": (checkpointed_fsdp, True),
    "reentrant": (functools.partial(checkpoint_by_torch, implementation=CheckpointImpl.REENTRANT), False),
    "not-reentrant": (functools.partial(checkpoint_by_torch, implementation=CheckpointImpl.NO_REENTRANT), False),
}


def error_of(wrap: Wrap, averages: bool, wrapped_first: bool) -> float:
    """The largest relative error of loss and gradients; another forward, of another length, comes before backward."""
    tiny = MODELS["mistral-window5"]
    reference, model = tiny.build(), tiny.build()
    wrapped = wrap(model) if wrapped_first else model
    sp_attention.enable(wrapped, backend="sdpa")
    if not wrapped_first:
        wrapped = wrap(model)
    losses = []
    for each in (reference, wrapped):
        loss = each(**batch_of("left-padded", 33)).loss
        with torch.no_grad():
            each(**batch_of("plain", 20))
        loss.backward()
        losses.append(loss.detach())
    if not averages:
        sp_attention.average_gradients(model)
    errors = [relative_error(losses[1], losses[0])]
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        errors.append(relative_error(grad, theirs[name.replace("_checkpoint_wrapped_module.", "")].grad))
    return max(errors)


def errors_of_wraps() -> dict[str, float]:
    return {
        f"{name}, {'wrapped' if first else 'enabled'} first": error_of(wrap, averages, first)
        for name, (wrap, averages) in WRAPS.items()
        for first in (True, False)
    }


def test_losses_and_gradients_are_those_of_one_process() -> None:
    for errors in run_ranks(2, errors_of_wraps, timeout=120):
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


def low_precision() -> dict[str, tuple[float, float, float]]:
    """Losses of one process and of the ranks, and that of one process in float64."""
    tiny, batch = MODELS["llama-6q3kv"], batch_of("left-padded", 33)
    losses = {}
    for way, dtype in (("autocast", torch.float32), ("bfloat16", torch.bfloat16)):
        reference, model = tiny.build(dtype), tiny.build(dtype)
        sp_attention.enable(model, backend="sdpa")
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            pair = [each(**batch).loss.item() for each in (reference, model)]
        losses[way] = (*pair, tiny.build()(**batch).loss.item())
    return losses


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
def test_low_precision_is_as_close_as_one_process_is(ranks: int) -> None:
    for losses in run_ranks(ranks, low_precision):
        for alone, sharded, exact in losses.values():
            # Twice the error that one process has in the same precision.
            assert abs(sharded - exact) <= 2 * abs(alone - exact) + 1e-6


def distance(grads: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all gradients as one vector, relative to its length."""
    squares = [
        ((ours.double() - theirs).square().sum(), theirs.square().sum())
        for ours, theirs in zip(grads, exact, strict=True)
    ]
    return float((sum(one for one, _ in squares) / sum(one for _, one in squares)) ** 0.5)


def mixed_precision() -> tuple[float, float]:
    """How far the gradients of FSDP2 in bfloat16 are from float64, and those of a bfloat16 model in one process."""
    tiny, batch = MODELS["llama-6q3kv"], batch_of("left-padded", 33)
    exact, narrow, model = tiny.build(), tiny.build(torch.bfloat16), tiny.build(torch.float32)
    sp_attention.enable(model, backend="sdpa")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    for each in (exact, narrow, model):
        each(**batch).loss.backward()
    expected = [parameter.grad for parameter in exact.parameters()]
    return (
        distance([parameter.grad.full_tensor() for parameter in model.parameters()], expected),
        distance([parameter.grad for parameter in narrow.parameters()], expected),
    )


def test_mixed_precision_of_fsdp2_is_as_close_as_one_process_is() -> None:
    for sharded, alone in run_ranks(2, mixed_precision, timeout=120):
        assert 0 < sharded <= 1.5 * alone
