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
    on the others. Does nothing without a process group.
    Raises ValueError for sharded parameters, whose engine averages already.
    """
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError("the parameters are sharded by an engine that averages gradients itself")
    if not parameters:
        return
    device = parameters[0].device
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX, group=group)
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            kinds.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    size = dist.get_world_size(group)
    for bucket in (bucket for grads in kinds.values() for bucket in _buckets(grads)):
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=group)
        flat /= size
        for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(mean.view_as(grad))


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
