"""A stand-in for HCCL: collectives of tensors on the stand-in's devices, by gloo, in the memory that both see."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from host import on_host
from torch import Tensor
from torch.utils._pytree import tree_map

from sp_attention.launch import run_ranks

COLLECTIVES = ("allgather", "allreduce", "alltoall_base", "broadcast", "barrier", "_allgather_base", "send", "recv")


class HostGroup(dist.ProcessGroup):
    """Hands each collective on to a group of gloo, with the same numbers as tensors of the CPU."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        # torch sets and reads it.
        self.name = ""

    def getBackendName(self) -> str:
        return "host"

    @property
    def group_name(self) -> str:
        return self.name

    def _set_group_name(self, name: str) -> None:
        self.name = name


def _forwarded(collective: str) -> Callable[..., Any]:
    def call(self: HostGroup, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda value: on_host(value) if isinstance(value, Tensor) else value, (args, kwargs))
        return getattr(self.gloo, collective)(*args, **kwargs)

    return call


for _name in COLLECTIVES:
    setattr(HostGroup, _name, _forwarded(_name))


def install() -> None:
    dist.Backend.register_backend("host", HostGroup, devices=["cpu", "npu"])


def run_on_devices(
    ranks: int, folder: Path, function: Callable[..., Any], *args: Any, timeout: float = 300
) -> list[Any]:
    """As `run_ranks`, with a process group for the stand-in's devices; `folder` is empty, for the ranks to meet in."""
    return run_ranks(ranks, _work, ranks, folder, function, args, timeout=timeout)


def _work(ranks: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import standin  # noqa: F401  # registers the stand-ins

    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("host", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    return function(*args)
