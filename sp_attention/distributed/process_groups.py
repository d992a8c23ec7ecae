"""Which ranks share a sequence: from a size, a process group, a device mesh or an mpu object."""

import atexit
import os
import socket
import time
from functools import cache
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sp_attention.distributed.peers import Peers

# What the interface is called by which a machine talks to itself, on Linux and on macOS.
_LOOPBACK = ("lo", "lo0")

# What a dimension of a mesh may be called for us to take it without being told.
MESH_DIM = "sp"


@runtime_checkable
class ModelParallelUnit(Protocol):
    """An mpu object, as DeepSpeed and Megatron-style trainers pass around."""

    def get_sequence_parallel_group(self) -> dist.ProcessGroup: ...


Group = dist.ProcessGroup | DeviceMesh | ModelParallelUnit


def resolve(group: Group | None, sp_size: int | None, device: torch.device) -> Peers | None:
    """The ranks that share this rank's sequences; None when it is alone.

    Without `group` and `sp_size` it is all processes. `sp_size` cuts all processes into groups of neighbouring ranks;
    it creates process groups, so every process must call. Under torchrun without a process group yet, one is started
    for `device`; whoever started it, it ends when the process does. Raises ValueError, on every rank, for arguments
    that do not fit.
    """
    if group is not None and sp_size is not None:
        raise ValueError("give enable() either group or sp_size, not both")
    if group is None and not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            if sp_size not in (None, 1):
                raise ValueError(f"sp_size={sp_size} needs {sp_size} processes or more, and this is one: use torchrun")
            return None
        start_process_group(device)
    # Another library's too: none leaves gloo's threads the moment that they need.
    _end_in_order()
    found = _cut_world(sp_size) if sp_size is not None else _process_group(group)
    size = dist.get_world_size(found)
    return Peers(found, dist.get_rank(found), size) if size > 1 else None


def place(peers: Peers | None) -> tuple[int, int]:
    """How many groups like this rank's all processes make, and which of them is this rank's.

    Raises ValueError when a group is not made of neighbouring ranks: then nobody knows which batch is whose.
    """
    if not dist.is_initialized():
        return 1, 0
    ranks = [dist.get_rank()] if peers is None else dist.get_process_group_ranks(peers.group)
    world, size, first = dist.get_world_size(), len(ranks), ranks[0]
    if world % size or first % size or ranks != list(range(first, first + size)):
        raise ValueError(
            f"the ranks {ranks} of {world} share their sequences, and loaders want neighbours to share them, in groups "
            f"of one size: make the dimension that shares the sequence the last one of the device mesh, or use sp_size"
        )
    return world // size, first // size


def shared_by(peers: Peers) -> str:
    """Who shares a sequence, as text for people."""
    if peers.is_alone:
        return "one rank, which has whole sequences"
    world, size = dist.get_world_size(), peers.size
    groups = f"{world} processes = {world // size} group{'s' if world > size else ''} x {size} ranks, "
    return f"{'' if world % size else groups}each sequence shared by its group"


def listen_on_this_machine() -> None:
    """Let gloo listen on the loopback interface only, unless the user has said where: for ranks of one machine."""
    loopback = next((name for _, name in socket.if_nameindex() if name in _LOOPBACK), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def start_process_group(device: torch.device) -> None:
    """Start the default process group that torchrun's environment describes, and end it when the process ends."""
    if "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        listen_on_this_machine()
    dist.init_process_group(dist.get_default_backend_for_device(device))
    _end_in_order()


@cache
def _end_in_order() -> None:
    """Let the process end its process group, whoever started it, before it ends itself."""
    atexit.register(_end_process_group)


def _end_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    # gloo's threads let go of the last tensors only now, for which they need the interpreter; without this moment they
    # may find it gone and abort the process (seen with torch 2.13).
    time.sleep(0.05)


def _process_group(group: Group | None) -> dist.ProcessGroup:
    if group is None:
        return _world()
    if isinstance(group, dist.ProcessGroup):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim == 1:
            return group.get_group()
        names = group.mesh_dim_names or ()
        if MESH_DIM not in names:
            raise ValueError(
                f"a device mesh of {group.ndim} dimensions {names or '(unnamed)'} does not say which one shares the "
                f"sequence: pass one dimension, as in mesh[{(names or ('sp',))[-1]!r}], or name it {MESH_DIM!r}"
            )
        return group[MESH_DIM].get_group()
    if isinstance(group, ModelParallelUnit):
        return group.get_sequence_parallel_group()
    raise ValueError(
        f"group is a {type(group).__name__}; it must be a ProcessGroup, a DeviceMesh, or an object with "
        "get_sequence_parallel_group()"
    )


def _cut_world(sp_size: int) -> dist.ProcessGroup:
    world = dist.get_world_size()
    if sp_size < 1 or world % sp_size:
        *most, last = [str(size) for size in range(1, world + 1) if world % size == 0]
        sizes = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"{world} processes cannot be cut into groups of {sp_size}; use {sizes}")
    if sp_size == world:
        return _world()
    mine: dist.ProcessGroup
    mine, _ = dist.new_subgroups(sp_size)
    return mine


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None  # a process group was found or started before
    return world
