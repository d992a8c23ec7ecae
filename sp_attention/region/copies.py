"""The hooks in a copy of an enabled model: copied with it, they share the region of the one that they were made for."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sp_attention.region import direct_call
from sp_attention.region.context import Context
from sp_attention.region.hook import Hook
from sp_attention.region.hooks import Hooks
from sp_attention.region.others import Others
from sp_attention.region.plan import RegionPlan

# Where modules keep hooks, and which of them are given keyword arguments, and called after errors too.
_PLACES = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


@dataclass(eq=False)
class CopiedHooks:
    """Ours in `model`, a copy. They work as in `original`, whatever becomes of it."""

    original: Hooks
    model: PreTrainedModel
    _taken: tuple[tuple[nn.Module, str, Any], ...] = ()
    _forwards: Mapping[nn.Module, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def plan(self) -> RegionPlan:
        return self.original.plan

    @property
    def context(self) -> Context:
        return self.original.context

    @property
    def are_installed(self) -> bool:
        return any(_ours_in(self.model))

    def remove(self) -> None:
        """Take them all away."""
        found = [*_ours_in(self.model)]
        self._taken = tuple((module, place, getattr(module, place)[number]) for module, place, number in found)
        self._forwards = {module: kept for module in self.model.modules() if (kept := direct_call.take_away(module))}
        for module, place, number in found:
            handle = RemovableHandle(
                getattr(module, place), extra_dict=[getattr(module, name) for name in _PLACES[place]]
            )
            handle.id = number
            handle.remove()

    def install(self) -> None:
        """Put those back that were taken away."""
        for module, place, hook in self._taken:
            if place == "_forward_pre_hooks":
                module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                module.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=True)
        for module, kept in self._forwards.items():
            vars(module).update(kept)
        self._taken, self._forwards = (), {}

    def others_now(self) -> Others:
        """What others have put into the copy."""
        return self.original.others.in_model(self.model, self.plan)

    def for_the_loss(self) -> AbstractContextManager[None]:
        """As of the original."""
        return self.original.for_the_loss()


def _ours_in(model: nn.Module) -> Iterator[tuple[nn.Module, str, int]]:
    """The modules that have hooks of ours, where these are, and under which number."""
    for module in model.modules():
        for place in _PLACES:
            for number, hook in getattr(module, place).items():
                if isinstance(hook, Hook):
                    yield module, place, number
