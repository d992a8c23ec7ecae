"""How a model attends: by our function, under a key of our own in transformers' registries, and as it did before."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet, finalize

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

# How masks are made for transformers: the arguments of its mask builder → what layers are given.
Masks = Callable[..., Any]

# Who attends by a key of ours: the handle of an enabled model, and those of its copies, as long as there are any.
_USERS: dict[str, WeakSet[Any]] = {}

# Configurations, and the attention that each names.
Own = list[tuple[PreTrainedConfig, str | None]]


def attend_by(model: PreTrainedModel, key: str, attention: Callable[..., Any], masks: Masks, undo: ExitStack) -> None:
    """Let the model attend by `attention`, known to transformers as `key`, with masks made by `masks`."""
    before = own_attention(model)

    # A callback and no context manager: a generator that is collected would undo it, and handles need not be kept.
    def restore() -> None:
        # Setting a configuration sets those inside it too, so they come after it.
        for config, implementation in before:
            config._attn_implementation = implementation
        _forget_unused(key)

    register(key, attention)
    AttentionMaskInterface.register(key, torch.compiler.disable(masks))
    undo.callback(restore)
    verbosity = logging.get_verbosity()
    # A model that cannot be told how to attend is found out right after, and no one needs a warning of it.
    logging.set_verbosity_error()
    try:
        model.set_attn_implementation(key)
    finally:
        logging.set_verbosity(verbosity)


def register(key: str, attention: Callable[..., Any]) -> None:
    """Let transformers know an attention function as `key`, instead of another one. Compiled models run it as it is."""
    AttentionInterface.register(key, torch.compiler.disable(attention))


def keep(key: str, user: Any) -> None:
    """Keep `key` known as long as this user is there, and has not left it."""
    _USERS.setdefault(key, WeakSet()).add(user)
    finalize(user, _forget_unused, key)


def leave(key: str, user: Any) -> None:
    """Undo `keep`."""
    _USERS.get(key, WeakSet()).discard(user)
    _forget_unused(key)


def _forget_unused(key: str) -> None:
    """Let transformers know nothing as `key` any more, unless somebody attends by it."""
    if not [*_USERS.get(key, ())]:  # By its length a set does not know yet that one of them is gone.
        # transformers has a function to register and none to take back.
        AttentionInterface._global_mapping.pop(key, None)
        AttentionMaskInterface._global_mapping.pop(key, None)
        _USERS.pop(key, None)


def release(own: Own, models: tuple[PreTrainedModel, ...]) -> None:
    """Give back their own attention to all but `models`: there is no stack in them, as in a tower of images."""
    ours = {id(model.config) for model in models}
    attend_as([(config, implementation) for config, implementation in own if id(config) not in ours])


def attend_as(own: Own) -> None:
    """Let models attend as their configurations did when `own` was read."""
    for config, implementation in own:
        # Not by the property, which sets the configurations inside it too.
        config._attn_implementation_internal = implementation


def own_attention(model: PreTrainedModel) -> Own:
    """How a model and the models in it attend now."""
    return [(config, config._attn_implementation) for config in configs(model)]


def configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations of a model and of the models in it, each before the ones it contains."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: PreTrainedConfig) -> None:
        found.setdefault(id(config), config)
        for name in config.sub_configs:
            if getattr(config, name, None) is not None:
                add(getattr(config, name))

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            add(module.config)
    return list(found.values())
