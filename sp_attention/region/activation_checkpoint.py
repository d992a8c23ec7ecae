"""Activation checkpoints inside of a layer, which run it again in backward: they are told in which scope that was."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers.modeling_layers import GradientCheckpointingLayer

from sp_attention.errors import UnsupportedError
from sp_attention.region.context import Context, Scope
from sp_attention.region.hook import is_hooked
from sp_attention.region.versions import (
    CHECKPOINT_FUNCTION,
    checkpoint_calls,
    checkpoint_forwards,
    require_forward_checkpointed,
)

# Where transformers' layers and torch's wrapper keep the function that checkpoints.
_FUNCTIONS = {GradientCheckpointingLayer: CHECKPOINT_FUNCTION, CheckpointWrapper: "checkpoint_fn"}
# A module that may run again, and the attribute that holds the function that does it.
Checkpoint = tuple[nn.Module, str]


def checkpoints_in(layer: nn.Module) -> list[Checkpoint]:
    """Those of a layer and of the modules in it."""
    return [(one, name) for one in layer.modules() for kind, name in _FUNCTIONS.items() if isinstance(one, kind)]


@dataclass(eq=False)
class ActivationCheckpoints:
    """The checkpoints of the layer in progress, whose functions are bound to its scope meanwhile.

    _within_hooks: the layers of the model in progress that checkpoint less than they do otherwise.
    """

    context: Context
    _bound: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    _within_hooks: list[nn.Module] = field(default_factory=list)

    def enter(self, model: nn.Module) -> None:
        """Let the layers of a model that is called now checkpoint what is within their hooks."""
        self._within_hooks = checkpoint_forwards(model)

    def leave(self) -> None:
        """Leave everything as it was before `enter`; what an error or an interrupt has left changed too."""
        self.unbind()
        checkpoint_calls(self._within_hooks)
        self._within_hooks = []

    def bind(self, layer: nn.Module, checkpoints: list[Checkpoint], offloads_from: str | None) -> bool:
        """Tie the scope of now to what of a layer runs again in backward, when it is no longer the scope of now.

        offloads_from: the type of the device whose tensors are kept in CPU memory meanwhile, None for no such. Returns
        whether anything runs again.
        """
        for module, name in checkpoints:
            of_transformers = isinstance(module, GradientCheckpointingLayer)
            if of_transformers and not (module.gradient_checkpointing and module.training):
                continue
            if of_transformers:
                require_forward_checkpointed(module)
            checkpoint = getattr(module, name)
            setattr(module, name, partial(self._bound_to, layer, self.context.scope, checkpoint, offloads_from))
            self._bound.append((module, name, checkpoint))
        return bool(self._bound)

    def unbind(self) -> None:
        """Give back their functions."""
        for module, name, checkpoint in self._bound:
            setattr(module, name, checkpoint)
        self._bound.clear()

    def _bound_to(
        self,
        layer: nn.Module,
        scope: Scope,
        checkpoint: Any,
        offloads_from: str | None,
        function: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        def within(*args: Any, **kwargs: Any) -> Any:
            if not is_hooked(layer):
                raise UnsupportedError(
                    "a checkpointed layer runs again in backward as it ran in an enabled model, which it is no longer: "
                    "call backward() before handle.disable(), and not within handle.suspended()"
                )
            with self.context.recomputation(scope):
                return function(*args, **kwargs)

        keeping: Callable[[], AbstractContextManager[Any]] = nullcontext
        if offloads_from is not None:
            keeping = partial(save_on_cpu, pin_memory=True, device_type=offloads_from)
        with keeping():
            return checkpoint(within, *args, **options)
