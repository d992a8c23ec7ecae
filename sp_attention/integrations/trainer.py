"""A Trainer that counts groups of ranks where it would count processes."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from sp_attention.api import Handle, handle_of
from sp_attention.integrations.accelerate import GroupAccelerator, require_fit
from sp_attention.integrations.trainer_checkpoints import WholeCheckpoints
from sp_attention.region.versions import batch_rebalance_sampler


class InGroups(WholeCheckpoints):
    """Counts groups where Trainer counts processes, most of all by an accelerator that does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_fit(self.accelerator)
        self._handle()

    @property
    def accelerator(self) -> GroupAccelerator:
        return self._accelerator

    @accelerator.setter
    def accelerator(self, made: Accelerator) -> None:
        self._accelerator = GroupAccelerator.of(made, self._handle)

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

    def _generating(self) -> AbstractContextManager[None]:
        """Within it the model generates: with the others of its group, or alone where caches are refused."""
        handle = self._handle()
        return nullcontext() if handle.refuses_caches is None else handle.suspended()

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // self._group_size()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # Losses are scaled by the processes that gradients are averaged over.
        with self.accelerator.counting_groups():
            return super().compute_loss(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kw: Any) -> Any:
        handle = self._handle()
        if prediction_loss_only:
            how: AbstractContextManager[None] = handle.only_loss()
        else:
            how = self._generating() if getattr(self.args, "predict_with_generate", False) else nullcontext()
        with how:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kw)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # Trainer sums it up over all processes.
        return super().floating_point_ops(inputs) // self._group_size()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A loader whose workers draw the same random numbers on all ranks of a group; Trainer seeds them by rank."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        if isinstance(inner.worker_init_fn, partial) and "rank" in inner.worker_init_fn.keywords:
            inner.worker_init_fn = partial(inner.worker_init_fn, rank=self._handle().data_parallel_rank)
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[Any] | None:
        sampler: Sampler[Any] | None = super()._get_train_sampler(*args, **kwargs)
        rebalances = batch_rebalance_sampler()
        if rebalances is not None and isinstance(sampler, rebalances):
            handle = self._handle()
            rebalanced: Sampler[Any] = rebalances(
                sampler.lengths,
                sampler.effective_batch_size // self._group_size(),
                handle.data_parallel_size,
                sampler.grad_accum,
                sampler.shuffle,
                sampler.seed,
                handle.data_parallel_rank,
                sampler.drop_last,
            )
            return rebalanced
        return sampler
