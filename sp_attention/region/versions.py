"""What other versions of transformers do otherwise, or have under another name: from 5.5 to the newest.

Each difference is here alone, with the version that made it; what it is found by is a name, not a number, so that
copies of transformers from between two versions are what they are.
"""

from functools import partial
from importlib import import_module
from typing import Any

import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import PreTrainedModel, masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from sp_attention.errors import UnsupportedError

# 5.23.0: rows of packed documents ask a mask function about positions within documents. Before, they ask about those of
# the row, and the function that would remap them is not there: None, and no mask function has it in it.
remap_positions: Any = getattr(masking_utils, "remap_positions_for_packed_sequence", None)

# 5.23.0: gradient checkpointing is called activation checkpointing, and the methods of models with it.
CHECKPOINTING_ENABLE = (
    "activation_checkpointing_enable"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing_enable"
)

# 5.23.0: layers checkpoint their `forward`, and hooks on a layer run once, around that. Before they checkpoint
# `__call__`, hooks inside, so that what our hooks cut and gather would be within the checkpoint, and run again.
_CHECKPOINTS_CALLS = "__call__" in vars(GradientCheckpointingLayer)
_FUNCTION = "_gradient_checkpointing_func"
# Where a layer keeps the function that checkpoints it while it is called.
CHECKPOINT_FUNCTION = "_sp_attention_checkpoint" if _CHECKPOINTS_CALLS else _FUNCTION


def checkpoint_activations(model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
    """Let the layers of a model run again in backward. options: those of `torch.utils.checkpoint`."""
    getattr(model, CHECKPOINTING_ENABLE)(options)


def keep_activations(model: PreTrainedModel) -> None:
    """Let them keep their activations again."""
    getattr(model, CHECKPOINTING_ENABLE.replace("enable", "disable"))()


def checkpoint_forwards(model: nn.Module) -> list[nn.Module]:
    """Until `checkpoint_calls`, let layers that checkpoint their calls checkpoint their forwards, as those of 5.23 do.

    Returns the layers that are changed: attributes of theirs, which are gone when that was called. Raises
    UnsupportedError, on every rank alike, if one is also checkpointed by torch's wrapper.
    """
    if not _CHECKPOINTS_CALLS:
        return []
    modules = list(model.modules())
    changed: list[nn.Module] = [
        one
        for one in modules
        if isinstance(one, GradientCheckpointingLayer)
        and one.gradient_checkpointing
        and one.training
        and _FUNCTION in vars(one)
    ]
    wrapped = {inside for one in modules if isinstance(one, CheckpointWrapper) for inside in one.modules()}
    for layer in changed:
        if layer in wrapped:
            raise _checkpointed_twice(layer)
    for layer in changed:
        held = vars(layer)
        held[CHECKPOINT_FUNCTION] = held[_FUNCTION]
        held[_FUNCTION] = _call
        held["forward"] = _CheckpointedForward(layer, held.get("forward"))
    return changed


def checkpoint_calls(layers: list[nn.Module]) -> None:
    """Let them checkpoint their calls again."""
    for layer in layers:
        held = vars(layer)
        function = held.pop(CHECKPOINT_FUNCTION)
        if held[_FUNCTION] is _call:  # not after an interrupt, and a new one
            held[_FUNCTION] = function
        before = held.pop("forward").before
        if before is not None:
            held["forward"] = before


def require_forward_checkpointed(layer: nn.Module) -> None:
    """Raise UnsupportedError, on every rank alike, if a layer that is called now checkpoints its call.

    So does one that other code than torch's wrapper runs again in backward.
    """
    if _CHECKPOINTS_CALLS and CHECKPOINT_FUNCTION not in vars(layer):
        raise _checkpointed_twice(layer)


def batch_rebalance_sampler() -> Any:
    """5.17.0: the sampler of `train_sampling_strategy="batch_rebalance"`, None where there is no such."""
    return getattr(import_module("transformers.trainer_pt_utils"), "BatchRebalanceSampler", None)


def _checkpointed_twice(layer: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"a {type(layer).__name__} is checkpointed by transformers {transformers.__version__} and, around it, by other "
        "code: use one of the two, or transformers 5.23, where layers checkpoint what is within hooks"
    )


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


class _CheckpointedForward:
    """The forward of a layer, in a checkpoint. before: what the instance had in its place."""

    def __init__(self, layer: nn.Module, before: Any) -> None:
        self.layer, self.before = layer, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = partial(type(self.layer).forward, self.layer) if self.before is None else self.before
        return vars(self.layer)[CHECKPOINT_FUNCTION](partial(own, **kwargs), *args)
