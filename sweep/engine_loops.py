"""What each engine makes of a model, in the words of one training loop."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sp_attention

LEARNING_RATE = 0.1


@dataclass
class Loop:
    """What an engine makes of a model, in the words of a training loop.

    model: is called. is_last: is told before each forward whether gradients are averaged in its backward. step: after
    the last backward; leaves no gradients behind, and returns their norm, None where an engine has none to tell.
    weights: all of them, whole, on every rank.
    """

    model: nn.Module
    is_last: Callable[[bool], None]
    backward: Callable[[Tensor], None]
    step: Callable[[], float | None]
    weights: Callable[[], dict[str, Tensor]]


def of_torch(
    model: nn.Module, wrapped: nn.Module, is_last: Callable[[bool], None], before_step: Callable[[], None]
) -> Loop:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> float:
        before_step()
        norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def weights() -> dict[str, Tensor]:
        return {
            name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
            for name, weight in model.named_parameters()
        }

    return Loop(wrapped, is_last, Tensor.backward, step, weights)


def none(model: nn.Module, accumulation: int, sp_size: int) -> Loop:
    return of_torch(model, model, lambda last: None, partial(sp_attention.average_gradients, model))


def ddp(model: nn.Module, accumulation: int, sp_size: int, **options: bool) -> Loop:
    wrapped = DistributedDataParallel(model, **options)

    def is_last(last: bool) -> None:
        # What `no_sync` does, which torch itself does not take in the first backward of a static graph.
        wrapped.require_backward_grad_sync = last or wrapped.static_graph

    return of_torch(model, wrapped, is_last, lambda: None)


def fsdp2(
    model: nn.Module, accumulation: int, sp_size: int, *, hybrid: bool = False, offload: OffloadPolicy | None = None
) -> Loop:
    world = dist.get_world_size()
    # Hybrid: weights are sharded in a group, and replicated over groups.
    shape, names = ((world // sp_size, sp_size), ("replicate", "shard")) if hybrid else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh, offload_policy=offload or OffloadPolicy())
    return of_torch(model, model, model.set_requires_gradient_sync, lambda: None)


def zero(model: nn.Module, accumulation: int, sp_size: int, *, stage: int) -> Loop:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": f"{dist.get_rank()}", "LOCAL_RANK": f"{dist.get_rank()}"}
    os.environ |= {"WORLD_SIZE": f"{dist.get_world_size()}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    import deepspeed
    import deepspeed.ops

    # What it would compile for CPUs as soon as it starts, training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if not stage:
        model.float()  # It takes no float64 on CPUs.
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    lasts = [True]

    def backward(loss: Tensor) -> None:
        # Stage 0 divides the model's own tensor by the accumulated micro-batches, asked or not.
        engine.backward(loss * 1, scale_wrt_gas=False)
        if not lasts[0]:
            engine.step()

    def step() -> float | None:
        engine.step()
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def weights() -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters([*model.parameters()]):
            return {name: weight.detach().double().clone() for name, weight in model.named_parameters()}

    return Loop(engine, partial(lasts.__setitem__, 0), backward, step, weights)


ENGINES: dict[str, Callable[[nn.Module, int, int], Loop]] = {
    "none": none,
    "DDP": ddp,
    "DDP, static graph": partial(ddp, static_graph=True),
    "DDP, unused parameters": partial(ddp, find_unused_parameters=True),
    "FSDP2": fsdp2,
    "FSDP2, offloaded": partial(fsdp2, offload=CPUOffloadPolicy(pin_memory=False)),
    "HSDP": partial(fsdp2, hybrid=True),
    **{f"ZeRO-{stage}": partial(zero, stage=stage) for stage in range(4)},
}
EITHER_ORDER = ("DDP", "FSDP2")
