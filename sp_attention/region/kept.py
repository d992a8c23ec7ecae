"""What modules hold besides weights, kept to be given back: forwards write into the modules that they run.

A router keeps the capacity of the last batch, a layer its balance loss, and BigBird puts another attention in place of
its own for good at the first short text.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sp_attention.distributed.sharded_params import belongs_to_engine
from sp_attention.region import direct_call
from sp_attention.region.attn_implementation import configs

# What `enable` itself sets while it rehearses: modes, the loss function, how a model attends, and forwards of models.
_OURS = {"training", "_loss_function", "_attn_implementation_internal", "forward", direct_call.BEFORE}

# What DeepSpeed counts in modules while it gathers their weights, and transformers' note that its recorders are there.
_OF_OTHERS = ("ds_", "applied_pre_backward", "_output_capturing_hooks_installed")


@dataclass(frozen=True)
class Attributes:
    """The plain attributes of modules and of their configurations, and what stands in their lists, dicts and sets.

    So modules, parameters and buffers too, which torch keeps in dicts. By identity: their numbers are not looked at.
    Not what an engine keeps in the modules whose weights it gathers: those, and notes of its own.
    """

    _attributes: list[tuple[dict[str, Any], dict[str, Any]]]
    _containers: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> "Attributes":
        owners: list[Any] = [*module.modules()]
        owners += configs(module) if isinstance(module, PreTrainedModel) else []
        attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
        gathered = {id(one._parameters) for one in module.modules() if any(map(belongs_to_engine, one.parameters()))}
        held = {id(value): value for _, kept in attributes for value in kept.values() if id(value) not in gathered}
        containers = [(value, value.copy()) for value in held.values() if type(value) in (dict, list, set)]
        return cls(attributes, containers)

    def restore(self) -> None:
        for now, kept in self._attributes:
            for name in [name for name in now if name not in kept and not _is_others(name)]:
                del now[name]
            for name, value in kept.items():
                if now.get(name, now) is not value and not _is_others(name):
                    now[name] = value
        for container, kept in self._containers:
            if (container or kept) and not _RESTORED[type(container)](container, kept):
                container.clear()
                (container.extend if type(container) is list else container.update)(kept)


def _is_others(name: str) -> bool:
    return name in _OURS or name.startswith(_OF_OTHERS)


def _is_list(now: list[Any], kept: list[Any]) -> bool:
    return len(now) == len(kept) and all(map(is_, now, kept))


def _is_dict(now: Mapping[Any, Any], kept: Mapping[Any, Any]) -> bool:
    return _is_list([*now.values()], [*kept.values()]) and [*now] == [*kept]


# Whether a container holds what it held.
_RESTORED: Mapping[type, Callable[[Any, Any], bool]] = {dict: _is_dict, list: _is_list, set: set.__eq__}


@dataclass(frozen=True)
class Buffers:
    """The numbers in a module's buffers, such as the running means of a batch normalisation."""

    _kept: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, module: nn.Module) -> "Buffers":
        return cls([(buffer, buffer.clone()) for buffer in module.buffers() if buffer.device.type != "meta"])

    def restore(self) -> None:
        with torch.no_grad():
            for buffer, kept in self._kept:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


@contextmanager
def as_before(module: nn.Module) -> Iterator[None]:
    """Whatever is inside leaves the attributes of a module, and of the modules in it, as they are."""
    kept = Attributes.of(module)
    try:
        yield
    finally:
        kept.restore()
