"""The mean of gradients over all ranks, for training loops without an engine that takes it."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET = 64 * 2**20


def average_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Replace each parameter's gradient by its mean over `group`, all processes by default.

    Call it after `backward()` and before the optimizer step or clipping, once for several accumulated backwards. DDP,
    FSDP and ZeRO take this mean themselves: then do not call it. A gradient that only some ranks have counts as zero
    on the others. Does nothing without a process group. With tensor parallelism `group` is of the ranks that have the
    same parts of the weights, such as `mesh["sp"].get_group()`.
    Raises ValueError for parameters of which the ranks of the group have different parts: an engine averages these.
    """
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    if any(_is_cut_up(parameter, group) for parameter in parameters):
        raise ValueError(
            "the parameters are sharded by an engine that averages gradients itself, or by tensor parallelism: then "
            'pass the group of the ranks that have the same parts, as group=mesh["sp"].get_group()'
        )
    device = parameters[0].device
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX, group=group)
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = _mine(parameter, parameter.grad)
            kinds.setdefault((grad.dtype, grad.device), []).append(grad)
    size = dist.get_world_size(group)
    for bucket in (bucket for grads in kinds.values() for bucket in _buckets(grads)):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=group)
        flat /= size
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


def _is_cut_up(parameter: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether ranks of a group have different parts of a parameter."""
    if not isinstance(parameter, DTensor):
        return False
    mine = set(dist.get_process_group_ranks(group or dist.group.WORLD))
    groups = [
        parameter.device_mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    ]
    return any(len(mine.intersection(dist.get_process_group_ranks(one))) > 1 for one in groups)


def _mine(parameter: Tensor, grad: Tensor) -> Tensor:
    """This rank's part of a gradient, in the places of that of its parameter; it is written to."""
    if not isinstance(grad, DTensor) or not isinstance(parameter, DTensor):
        return grad
    if grad.placements != parameter.placements:
        parameter.grad = grad = grad.redistribute(placements=parameter.placements)
    mine: Tensor = grad.to_local()
    return mine


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbouring gradients in buckets of about BUCKET bytes: few collectives, and little memory beside them."""
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bucket.append(grad)
        size += grad.nbytes
        if size >= BUCKET or grad is grads[-1]:
            yield bucket
            bucket, size = [], 0
