"""Weights that are cut up over other dimensions of a mesh: by tensor and expert parallelism, and pipelines."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sp_attention.distributed.peers import Peers


def met_by_other_parallelism(model: nn.Module, peers: Peers) -> str | None:
    """Why a model cannot share sequences among these ranks: they share its weights already; None if they do not.

    Nothing is sent to find out. FSDP2 may share them among any ranks, since it gathers them before they are used.
    """
    if peers.is_alone:
        return None  # A rank alone shares none.
    mine = set(dist.get_process_group_ranks(peers.group))
    gathered = {id(one) for module in model.modules() if isinstance(module, FSDPModule) for one in module.parameters()}
    for name, parameter in model.named_parameters():
        for group in _groups_that_cut(parameter, id(parameter) in gathered):
            shared = sorted(mine.intersection(dist.get_process_group_ranks(group)))
            if len(shared) > 1:
                return (
                    f"{name} is cut up over ranks {shared} by tensor or expert parallelism, and enable() would share "
                    f"sequences among ranks {sorted(mine)}: these need whole batches of the same weights. Make a "
                    "device mesh with dimensions of their own, as init_device_mesh(device, (2, 4), "
                    'mesh_dim_names=("sp", "tp")), parallelize the model over mesh["tp"], and enable(group=mesh["sp"])'
                )
    return None


def _groups_that_cut(parameter: Tensor, is_gathered: bool) -> Iterator[dist.ProcessGroup]:
    """The groups of ranks that have another part of a parameter, also when it is used: `is_gathered` by FSDP2 first."""
    if isinstance(parameter, DTensor):
        cut = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
        for dim in cut[1:] if is_gathered else cut:
            yield parameter.device_mesh.get_group(dim)
