"""Together with what torch puts around a model: DDP, FSDP2, its own activation checkpointing, autocast."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from helpers import TWO_AND_THREE, ddp, fsdp, gradients_of, largest_error, too_large
from models import LLAMA, MODELS, batch_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sp_attention
from sp_attention.launch import run_ranks

Wrap = Callable[[nn.Module], nn.Module]


def checkpoint_by_torch(model: nn.Module, implementation: CheckpointImpl) -> nn.Module:
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(model, wrapper, lambda module: type(module).__name__.endswith("DecoderLayer"))
    if implementation is CheckpointImpl.REENTRANT:
        model.enable_input_require_grads()
    return model


def checkpointed_fsdp(model: nn.Module) -> nn.Module:
    return fsdp(checkpoint_by_torch(model, CheckpointImpl.NO_REENTRANT))


WRAPS: dict[str, Wrap] = {
    "ddp": ddp,
    "fsdp2": fsdp,
    "fsdp2-checkpointed": checkpointed_fsdp,
    "reentrant": functools.partial(checkpoint_by_torch, implementation=CheckpointImpl.REENTRANT),
    "not-reentrant": functools.partial(checkpoint_by_torch, implementation=CheckpointImpl.NO_REENTRANT),
}


def step(model: nn.Module) -> list[torch.Tensor]:
    """Another forward, of another length, comes before backward."""
    loss = model(**batch_of("left-padded", 33)).loss
    with torch.no_grad():
        model(**batch_of("plain", 20))
    loss.backward()
    return [loss.detach()]


def error_of(wrap: Wrap, wrapped_first: bool) -> float:
    tiny = MODELS["mistral-window5"]
    reference, model = tiny.build(), tiny.build()
    wrapped = wrap(model) if wrapped_first else model
    sp_attention.enable(wrapped, backend="sdpa")
    return largest_error(reference, wrapped if wrapped_first else wrap(model), step)


def errors_of_wraps() -> dict[str, float]:
    return {
        f"{name}, {'wrapped' if first else 'enabled'} first": error_of(wrap, first)
        for name, wrap in WRAPS.items()
        for first in (True, False)
    }


def test_losses_and_gradients_are_those_of_one_process() -> None:
    for errors in run_ranks(2, errors_of_wraps, timeout=120):
        assert not too_large(errors)


def low_precision() -> dict[str, tuple[float, float, float]]:
    """Losses of one process and of the ranks, and that of one process in float64."""
    batch = batch_of("left-padded", 33)
    losses = {}
    for way, dtype in (("autocast", torch.float32), ("bfloat16", torch.bfloat16)):
        reference, model = LLAMA.build(dtype), LLAMA.build(dtype)
        sp_attention.enable(model, backend="sdpa")
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            pair = [each(**batch).loss.item() for each in (reference, model)]
        losses[way] = (*pair, LLAMA.build()(**batch).loss.item())
    return losses


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_low_precision_is_as_close_as_one_process_is(ranks: int) -> None:
    for losses in run_ranks(ranks, low_precision):
        for alone, sharded, exact in losses.values():
            # Twice the error that one process has in the same precision.
            assert abs(sharded - exact) <= 2 * abs(alone - exact) + 1e-6


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of all gradients as one vector, relative to its length."""
    squares = [((found[name].double() - one).square().sum(), one.square().sum()) for name, one in exact.items()]
    return float((sum(one for one, _ in squares) / sum(one for _, one in squares)) ** 0.5)


def mixed_precision() -> tuple[float, float]:
    """How far the gradients of FSDP2 in bfloat16 are from float64, and those of a bfloat16 model in one process."""
    batch = batch_of("left-padded", 33)
    exact, narrow, model = LLAMA.build(), LLAMA.build(torch.bfloat16), LLAMA.build(torch.float32)
    sp_attention.enable(model, backend="sdpa")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    for each in (exact, narrow, model):
        each(**batch).loss.backward()
    return distance(gradients_of(model), gradients_of(exact)), distance(gradients_of(narrow), gradients_of(exact))


def test_mixed_precision_of_fsdp2_is_as_close_as_one_process_is() -> None:
    for sharded, alone in run_ranks(2, mixed_precision, timeout=120):
        assert 0 < sharded <= 1.5 * alone
