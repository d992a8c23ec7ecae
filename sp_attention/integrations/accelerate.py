"""accelerate: loaders that give the ranks of a group the same batches, and metrics that count each group once.

accelerate knows ranks that share their batches from tensor parallelism, so the groups are shown to it as such.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

from sp_attention.enabling import Handle


def data_loader(accelerator: Accelerator, loader: DataLoader[Any], handle: Handle) -> DataLoader[Any]:
    """The loader as `accelerator.prepare` would return it, for groups instead of ranks.

    All ranks of a group get the same batches, and each group others: the loader is cut into as many parts as there are
    groups. What is returned may be passed to `accelerator.prepare` again, to no effect.
    Raises ValueError when accelerate knows of other processes than there are, is to cut sequences too, or to read an
    iterable dataset on one rank for all.
    """
    with batches_by_group(accelerator, handle):
        prepared: DataLoader[Any] = accelerator.prepare(loader)
    return prepared


def gather(accelerator: Accelerator, data: Any, handle: Handle, use_gather_object: bool = False) -> Any:
    """As `accelerator.gather`, with what each group has once: tensors [N, …], nested or not → [groups * N, …].

    With `use_gather_object`, for data that differs in shape between groups: a list of the N of all groups.
    """
    size = dist.get_world_size() // handle.data_parallel_size
    if use_gather_object:
        return list(chain.from_iterable(gather_object([data])[::size]))
    return recursively_apply(partial(_first_of_every, size), accelerator.gather(data))


def gather_for_metrics(accelerator: Accelerator, data: Any, handle: Handle, use_gather_object: bool = False) -> Any:
    """As `accelerator.gather_for_metrics`: as `gather`, without what the last batch was filled up with."""
    gathered = gather(accelerator, data, handle, use_gather_object)
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return gathered
    if use_gather_object:
        return gathered[: state.remainder]
    return recursively_apply(lambda tensor: tensor[: state.remainder], gathered)


def _first_of_every(size: int, tensor: Tensor) -> Tensor:
    """[ranks * N, …] → [ranks / size * N, …], of the first rank of every `size` neighbours."""
    return torch.cat(tensor.chunk(dist.get_world_size())[::size])


def require_fit(accelerator: Accelerator) -> None:
    """Raise ValueError if accelerate knows of other processes than there are, or is to cut sequences or tensors."""
    if dist.is_initialized() and accelerator.num_processes != dist.get_world_size():
        raise ValueError(
            f"there are {dist.get_world_size()} processes and accelerate knows of {accelerator.num_processes}, so it "
            "would not average gradients: start them with torchrun or accelerate launch, which say so in the "
            "environment (RANK, LOCAL_RANK, WORLD_SIZE), and on CPUs say so to it too, with Accelerator(cpu=True) or "
            "TrainingArguments(use_cpu=True)"
        )
    config = accelerator.parallelism_config
    for name in ("sp_size", "cp_size", "tp_size"):
        if config is not None and getattr(config, name) > 1:
            raise ValueError(
                f"accelerate's ParallelismConfig has {name}={getattr(config, name)}, and sp_attention.enable() cuts "
                f"the sequence already: leave {name} out, accelerate is told of the groups"
            )


@contextmanager
def batches_by_group(accelerator: Accelerator, handle: Handle) -> Iterator[None]:
    """Within it, loaders that are prepared give all ranks of a group the same batches; see `data_loader`."""
    require_fit(accelerator)
    if handle.peers is None:
        yield
        return
    config, state = accelerator.dataloader_config, accelerator.state
    if config.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True reads batches on one rank and gives each rank another part of them; the ranks of a "
            "sequence-parallel group need the same ones: leave it out, and every rank reads the dataset"
        )
    mesh, dispatch = state.device_mesh, config.dispatch_batches
    state.device_mesh = _mesh(accelerator.device.type, handle.data_parallel_size, dist.group.WORLD)
    config.dispatch_batches = False
    try:
        yield
    finally:
        state.device_mesh, config.dispatch_batches = mesh, dispatch


@cache
def _mesh(device_type: str, groups: int, world: dist.ProcessGroup) -> DeviceMesh:
    """All ranks, in the names that accelerate's loaders read. They take neighbours to share their batches."""
    ranks = torch.arange(world.size()).view(groups, -1)
    return DeviceMesh(device_type, ranks, mesh_dim_names=("dp_replicate", "tp"))
