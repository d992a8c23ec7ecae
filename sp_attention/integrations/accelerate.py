"""accelerate: loaders that give the ranks of a group the same batches, and metrics that count each group once."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader

from sp_attention.api import Handle


class GroupAccelerator(Accelerator):  # type: ignore[misc]  # accelerate has no types
    """An accelerator to which each group is one process wherever data is cut, gathered or counted.

    handle: asks for the handle of the model. counts_groups: `num_processes` and `process_index` are those of groups.
    Else they are those of processes, as needed where accelerate saves what each of them has.
    """

    handle: Callable[[], Handle]
    counts_groups = False

    @classmethod
    def of(cls, accelerator: Accelerator, handle: Callable[[], Handle]) -> "GroupAccelerator":
        """A view of an accelerator: both know what either prepares."""
        view: GroupAccelerator = copy.copy(accelerator)
        view.__class__ = cls
        view.handle = handle
        return view

    @contextmanager
    def counting_groups(self) -> Iterator[None]:
        before, self.counts_groups = self.counts_groups, True
        try:
            yield
        finally:
            self.counts_groups = before

    @property
    def num_processes(self) -> int:
        return self.handle().data_parallel_size if self.counts_groups else self.state.num_processes

    @property
    def process_index(self) -> int:
        return self.handle().data_parallel_rank if self.counts_groups else self.state.process_index

    @property
    def torch_device_mesh(self) -> Any:
        # Loaders would count processes in the mesh of an engine instead.
        return None if self.counts_groups else super().torch_device_mesh

    @property
    def dispatch_batches(self) -> bool | None:
        # One rank that reads for all would read for each rank another batch.
        return super().dispatch_batches if self.handle().peers is None else False

    def prepare_data_loader(self, *args: Any, **options: Any) -> DataLoader[Any]:
        require_fit(self)
        if self.handle().peers is not None and super().dispatch_batches:
            raise ValueError(
                "dispatch_batches=True reads batches on one rank and gives each rank another part of them; the ranks "
                "of a sequence-parallel group need the same ones: leave it out, and every rank reads the dataset"
            )
        with self.counting_groups():
            prepared: DataLoader[Any] = super().prepare_data_loader(*args, **options)
        return prepared

    def gather(self, tensor: Any) -> Any:
        return recursively_apply(self.once_for_each_group, super().gather(tensor))

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        if not use_gather_object and _has_only_tensors(input_data):
            return super().gather_for_metrics(input_data)
        gathered = list(chain.from_iterable(gather_object([input_data])[:: self._group_size()]))
        is_filled_up = self.gradient_state.end_of_dataloader and self.gradient_state.remainder > 0
        return gathered[: self.gradient_state.remainder] if is_filled_up else gathered

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        reduced = super().reduce(tensor, reduction, scale)
        if reduction != "sum":
            return reduced
        return recursively_apply(lambda one: (one / self._group_size()).to(one.dtype), reduced)

    def _group_size(self) -> int:
        handle = self.handle()
        return 1 if handle.peers is None else dist.get_world_size() // handle.data_parallel_size

    def once_for_each_group(self, gathered: Tensor) -> Tensor:
        """[ranks * N, …] → [groups * N, …], of the first rank of every group."""
        size = self._group_size()
        if size == 1:
            return gathered
        groups = self.handle().data_parallel_size
        ranks: Tensor = gathered.unflatten(0, (groups, size, len(gathered) // (groups * size)))
        return ranks[:, 0].flatten(0, 1)


def data_loader(accelerator: Accelerator, loader: DataLoader[Any], handle: Handle) -> DataLoader[Any]:
    """The loader as `accelerator.prepare` would return it, for groups instead of ranks.

    All ranks of a group get the same batches, and each group others: the loader is cut into as many parts as there are
    groups. What is returned may be passed to `accelerator.prepare` again, to no effect.
    Raises ValueError when accelerate knows of other processes than there are, is to cut sequences too, or to read an
    iterable dataset on one rank for all.
    """
    prepared: DataLoader[Any] = GroupAccelerator.of(accelerator, lambda: handle).prepare(loader)
    return prepared


def gather(accelerator: Accelerator, data: Any, handle: Handle) -> Any:
    """As `accelerator.gather`, with what each group has once: tensors [N, …], nested or not → [groups * N, …]."""
    return GroupAccelerator.of(accelerator, lambda: handle).gather(data)


def gather_for_metrics(accelerator: Accelerator, data: Any, handle: Handle, use_gather_object: bool = False) -> Any:
    """As `accelerator.gather_for_metrics`: as `gather`, without what the last batch was filled up with.

    With `use_gather_object`, for data that differs in shape between groups: a list of the N of all groups.
    """
    return GroupAccelerator.of(accelerator, lambda: handle).gather_for_metrics(data, use_gather_object)


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
        size = getattr(config, name, 1)  # `sp_size` since accelerate 1.12.0
        if size > 1:
            raise ValueError(
                f"accelerate's ParallelismConfig has {name}={size}, and sp_attention.enable() cuts "
                f"the sequence already: leave {name} out, accelerate is told of the groups"
            )


def _has_only_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
