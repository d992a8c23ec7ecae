"""transformers' Trainer and what is derived from it, for models that were made sequence-parallel."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import EvalLoopOutput

from sp_attention.enabling import Handle, handle_of
from sp_attention.integrations.accelerate import batches_by_group, gather, gather_for_metrics, require_fit
from sp_attention.integrations.checkpoints import WholeCheckpoints

TrainerClass = TypeVar("TrainerClass", bound=Trainer)


def sequence_parallel(trainer_class: type[TrainerClass]) -> type[TrainerClass]:
    """A subclass of any Trainer for a model that `sp_attention.enable` was called on before.

    Everything is that of a run with as many processes as there are groups: the samples and their order, the total batch
    size, steps, epochs, learning rates, token counts, losses, gradient norms, evaluation and its metrics. All ranks of
    a group read the same data, and evaluation is sequence-parallel too.
    """
    return type(trainer_class.__name__, (_InGroups, trainer_class), {"__module__": trainer_class.__module__})


class _InGroups(WholeCheckpoints):
    """Counts groups where Trainer counts processes, as it does for tensor parallelism, whose ranks share batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_fit(self.accelerator)
        self._handle()

    def _handle(self) -> Handle:
        handle = None if self.model is None else handle_of(self.model)
        if handle is None:
            raise ValueError(
                f"{type(self.model).__name__} is not sequence-parallel: call sp_attention.enable(model) before the "
                "trainer is made, or in model_init"
            )
        return handle

    def _group_size(self) -> int:
        peers = self._handle().peers
        return 1 if peers is None else peers.size

    def get_tp_size(self) -> int:
        return super().get_tp_size() * self._group_size()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._group_size()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        items: Tensor | int | None = super()._get_num_items_in_batch(batch_samples, device)
        if isinstance(items, Tensor) and not self.args.average_tokens_across_devices:
            # Trainer divides by the ranks that share batches, as if it had summed over them.
            items = items * self._group_size()
        return items

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer sums it up over all processes.
        return super().floating_point_ops(inputs) // self._group_size()

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        with batches_by_group(self.accelerator, self._handle()):
            return self._seeded_by_group(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        with batches_by_group(self.accelerator, self._handle()):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        with batches_by_group(self.accelerator, self._handle()):
            return super().get_test_dataloader(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[Any] | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, BatchRebalanceSampler):
            handle = self._handle()
            return BatchRebalanceSampler(
                sampler.lengths,
                sampler.effective_batch_size // self._group_size(),
                handle.data_parallel_size,
                sampler.grad_accum,
                sampler.shuffle,
                sampler.seed,
                handle.data_parallel_rank,
                sampler.drop_last,
            )
        return sampler

    def _seeded_by_group(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """A loader whose workers draw the same random numbers on all ranks of a group; Trainer seeds them by rank."""
        inner = getattr(loader, "base_dataloader", loader)
        if isinstance(inner.worker_init_fn, partial) and "rank" in inner.worker_init_fn.keywords:
            inner.worker_init_fn = partial(inner.worker_init_fn, rank=self._handle().data_parallel_rank)
        return loader

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if self._handle().peers is not None:
            # Trainer sets it anew after every evaluation, and what is derived from Trainer before.
            self.gather_function = self._once_for_each_group(self.gather_function)
        return super().evaluation_loop(*args, **kwargs)

    def _once_for_each_group(self, function: Callable[..., Any]) -> Callable[[Any], Any]:
        made = function if isinstance(function, partial) else partial(function)
        function, options = made.func, made.keywords
        for_metrics = function == self.accelerator.gather_for_metrics
        return partial(
            gather_for_metrics if for_metrics else gather, self.accelerator, handle=self._handle(), **options
        )
