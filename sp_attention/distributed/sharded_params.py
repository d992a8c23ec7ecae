"""Parameters that an engine has cut up, FSDP2 or DeepSpeed's ZeRO-3, and how often all ranks that hold parts need them.

An engine gathers weights whenever a module is called that has them, or has them again in backward. So each of its
ranks, of whatever sequences, has to call it as often as the others.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def belongs_to_engine(parameter: Tensor) -> bool:
    """Whether an engine has cut it up by now, or may at any time: FSDP2, or ZeRO-3, which notes its size in it."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_numel")


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has cut up a parameter, which it leaves empty, with its size noted."""
    return parameter.numel() < int(getattr(parameter, "ds_numel", 0))


def most_of_engine(counts: Sequence[int], parameters: Iterable[Tensor], device: torch.device) -> list[int] | None:
    """The largest of each count over the ranks of the engine that these parameters belong to, None if to none.

    A collective of these ranks, on their `device`.
    """
    parameter = next(filter(belongs_to_engine, parameters), None)
    if parameter is None:
        return None
    most = torch.tensor(counts, device=device)
    for group in _groups(parameter):
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return [int(count) for count in most.tolist()]


def _groups(parameter: Tensor) -> list[dist.ProcessGroup]:
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return [mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard()]
    group: dist.ProcessGroup = parameter.ds_process_group  # type: ignore[attr-defined]  # DeepSpeed's own
    return [group]
