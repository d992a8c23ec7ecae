"""Hooks that are not this library's, on modules where it matters that somebody else looks at what goes in or out."""

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from sp_attention.distributed.sharded_params import belongs_to_engine
from sp_attention.region.hook import Hook

# Whose hook on embeddings only lets them require gradients, in checkpointed models.
_HARMLESS = transformers.modeling_utils.__name__


def hooks_of_others(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward hooks and pre-hooks of a module that are of others, such as NEFTune's, which adds noise."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if not (isinstance(hook, Hook) or getattr(hook, "__module__", None) == _HARMLESS)]


def watched_by_others(module: nn.Module) -> bool:
    """Whether hooks of others see what a module is given or returns; an engine's, which gathers its weights, do not."""
    return bool(hooks_of_others(module)) and not any(map(belongs_to_engine, module.parameters()))
