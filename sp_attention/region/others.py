"""What others have put into an enabled model, before or after `enable`: hooks, and modules and forwards of their own.

Hooks see and edit whole tensors, as in one process: around a layer with a hook everything is gathered, and a layer with
one inside runs on whole tensors, as does one that holds what was not there when it was proven. What cannot be so is
refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from sp_attention.region.direct_call import is_reached
from sp_attention.region.hook import Hook, is_hooked, layer_name
from sp_attention.region.plan import RegionPlan

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
# Whose hooks and forwards in place of a module's own do no more with a span than with the whole: they load, gather or
# convert weights, or record what we gather afterwards.
_HARMLESS = ("torch.", "accelerate.", "deepspeed.", "transformers.", "sp_attention.", "liger_kernel.")
# Those among them that do: they collect statistics of tokens.
_HARMFUL = ("torch.ao.",)
# The attribute of a hook that says so of itself, as a clock may, or who counts tokens of ranks.
SEES_SPANS = "sees_spans"
# What those of PEFT's hooks are given that tell rows apart, and tokens not.
_OF_ROWS = {"adapter_names"}
# Whose modules in the place of others treat each token alone; but for these, which attend, or hold numbers of tokens.
_ADAPTERS = ("peft.", "torchao.", "bitsandbytes.", "liger_kernel.", "deepspeed.", "accelerate.")
_MIXING_ADAPTERS = ("peft.tuners.xlora.", "peft.tuners.adaption_prompt.")
# Modules of torch that treat each token alone.
_TOKEN_WISE = (
    nn.Linear, nn.Identity, nn.Dropout, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid,
    nn.Embedding, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
)  # fmt: skip


@dataclass(frozen=True)
class Others:
    """What follows from what others have put into a model.

    separate: the stacks whose layers cut their arguments and gather their results. gathered: the layers that run on
    whole tensors. whole_after: something between the last layer and the loss sees what passes. told: each of these
    things, as text for people, and for ranks to compare. refused: why the model cannot run so.
    """

    separate: frozenset[str] = frozenset()
    gathered: frozenset[str] = frozenset()
    whole_after: bool = False
    told: tuple[str, ...] = ()
    refused: str | None = None


NOBODY = Others()


@dataclass(eq=False)
class OthersInModels:
    """Looks at a model once a forward; what it finds is kept until something changes.

    parts: what each layer was made of when it was proven.
    """

    parts: dict[str, "_Parts"] = field(default_factory=dict)
    _found: WeakKeyDictionary[nn.Module, tuple[list[Any], Others]] = field(default_factory=WeakKeyDictionary)

    def know(self, plan: RegionPlan) -> None:
        """Note what the layers are made of, of those that are not known yet."""
        for stack in plan.stacks:
            for layer in stack.layers:
                if layer.name not in self.parts:
                    self.parts[layer.name] = _Parts.of(layer.module)

    def in_model(self, model: nn.Module, plan: RegionPlan) -> Others:
        """What others have put into a model that is called now; our hooks come closest to its modules from here on."""
        seen = list(_everything(model))
        before = self._found.get(model)
        if before is None or before[0] != seen:
            before = self._found[model] = (seen, self._others(model, plan))
            seen[:] = _everything(model)  # In the order that our hooks have now.
        return before[1]

    def _others(self, model: nn.Module, plan: RegionPlan) -> Others:
        layers = {name: one for one in model.modules() if (name := layer_name(one)) is not None}
        refused = _of_all_modules() or self._replaced(model, plan)
        place = _Places(model, plan, layers)
        separate: set[str] = set()
        gathered: set[str] = set()
        told: list[str] = []
        whole_after = False
        for name, module in model.named_modules():
            whose = place.layer_of.get(module)
            hooks = [*_foreign(module, _HOOKS)]
            backward = [*_foreign(module, _BACKWARD_HOOKS)] if module is not model else []
            if backward:
                refused = refused or _backward(name, backward[0])
            if _has_another_forward(module):
                # It may do anything between the layers, and with what comes out of them.
                separate |= {stack.name for stack in plan.stacks}
                whole_after = True
                told.append(f"{name or type(module).__name__}: its forward is {_text(vars(module)['forward'])} now")
            if not hooks:
                continue
            _come_closest(module)
            if module is model or module in place.embeddings:
                continue  # They see what the user gave; embeddings look to it themselves.
            told += [f"{name}: {_text(hook)}" for hook in hooks]
            if whose is None:
                whole_after = True
            elif layers[whose] is module:
                separate.add(place.stack_of[whose])
            else:
                gathered.add(whose)
        for name, layer in layers.items():
            new = self.parts[name].new_in(layer) if name in self.parts else []
            told += [f"{name}: {text}" for text in new]
            gathered |= {name} if new else set()
        found = Others(frozenset(separate), frozenset(gathered), whole_after, tuple(told), refused)
        return NOBODY if found == NOBODY else found

    def _replaced(self, model: nn.Module, plan: RegionPlan) -> str | None:
        """Why the model cannot run if a layer is not the one that was hooked, or has lost its hooks."""
        for stack in plan.stacks:
            names = {layer.name.rpartition(".")[2] for layer in stack.layers}
            container = _at(model, stack.name)
            for number, child in () if container is None else container.named_children():
                if number in names and not any(layer_name(one) for one in child.modules()):
                    return (
                        f"{stack.name}.{number} ({type(child).__name__}) was put there after enable(), or its hooks "
                        "were removed, as by code that removes all hooks of a model: call handle.disable(), and "
                        "enable() again"
                    )
        return None


def _foreign(module: nn.Module, dicts: Sequence[str]) -> Iterator[Callable[..., Any]]:
    for name in dicts:
        for hook in getattr(module, name).values():
            if not (isinstance(hook, Hook) or _is_harmless(hook)):
                yield hook


def _has_another_forward(module: nn.Module) -> bool:
    """Whether a model that we have hooked was given another forward since, which does not lead to ours."""
    if "forward" not in vars(module) or not is_hooked(module):
        return False
    return isinstance(module, PreTrainedModel) and not is_reached(module)


def _come_closest(module: nn.Module) -> None:
    """Let our hooks run right before and right after the module, so that others see what the model would see."""
    before: Any = module._forward_pre_hooks  # ordered dicts, both, which can move what is in them
    after: Any = module._forward_hooks
    for key in [key for key, hook in before.items() if isinstance(hook, Hook)]:
        before.move_to_end(key)
    for key in reversed([key for key, hook in after.items() if isinstance(hook, Hook)]):
        after.move_to_end(key, last=False)


class _Places:
    """Where the modules of a model are: in which layer, of which stack, or an embedding that looks up spans."""

    def __init__(self, model: nn.Module, plan: RegionPlan, layers: Mapping[str, nn.Module]) -> None:
        self.stack_of = {layer.name: stack.name for stack in plan.stacks for layer in stack.layers}
        self.layer_of = {module: name for name, layer in layers.items() for module in layer.modules()}
        names = [stack.embedding.name for stack in plan.stacks if stack.embedding is not None]
        self.embeddings = {_at(model, name) for name in names}


@dataclass(frozen=True)
class _Parts:
    """What a layer is made of: the types of its modules by name, and the forwards in place of those of these types."""

    types: Mapping[str, type]
    forwards: Mapping[str, Any]

    @classmethod
    def of(cls, layer: nn.Module) -> "_Parts":
        parts = {_plain(name): module for name, module in layer.named_modules()}
        forwards = {name: _function(vars(one)["forward"]) for name, one in parts.items() if "forward" in vars(one)}
        return cls({name: type(one) for name, one in parts.items()}, forwards)

    def new_in(self, layer: nn.Module) -> list[str]:
        """What is in a layer now and may treat tokens in another way, as text."""
        found = []
        for name, module in layer.named_modules():
            own = self.types.get(_plain(name))
            if not (_is_token_wise(type(module)) or (own is not None and _is_still(module, own))):
                found.append(f"{name or 'the layer'} is a {type(module).__name__} now")
            forward = _function(vars(module).get("forward"))
            is_as_before = forward is None or forward is self.forwards.get(_plain(name))
            known = is_as_before or _is_from(forward, (*_HARMLESS, "peft."))
            if not known or _is_from(forward, _MIXING_ADAPTERS):
                found.append(f"{name or 'the layer'} has a forward of {_text(forward)} now")
        return found


def _everything(model: nn.Module) -> Iterator[Any]:
    """The modules inside a model, the hooks of all of them, and what stands in place of their forwards."""
    for name in _GLOBAL_HOOKS:
        yield from getattr(torch_module, name)
    inside: list[nn.Module] = []
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is None:
            continue
        own = module.__dict__
        inside.append(module)
        for name in (*_HOOKS, *_BACKWARD_HOOKS):
            if own[name]:
                yield from own[name]
        if "forward" in own:
            yield _function(own["forward"])
        todo += own["_modules"].values()
    yield from inside[1:]  # Not the model itself, which what is kept for it must not keep alive.


def _of_all_modules() -> str | None:
    for name in _GLOBAL_HOOKS:
        for hook in getattr(torch_module, name).values():
            if not _is_harmless(hook):
                return (
                    f"{_text(hook)} is a hook of all modules (torch.nn.modules.module.register_module_…_hook), and "
                    "would see the part of a sequence that this rank has: register it with the modules that it is "
                    "for, or give it an attribute sees_spans = True if that is right"
                )
    return None


def _backward(name: str, hook: Callable[..., Any]) -> str:
    return (
        f"{name}: {_text(hook)} is a backward hook, and would see the part of a gradient that this rank has: use hooks "
        "of parameters, whose gradients are exact once they are averaged, or do this within handle.suspended()"
    )


def _is_harmless(hook: Any) -> bool:
    function = _function(hook)
    if getattr(function, SEES_SPANS, False):
        return True
    if isinstance(hook, partial) and hook.keywords.keys() == _OF_ROWS and _is_from(function, ("peft.",)):
        return True
    return _is_from(function, _HARMLESS) and not _is_from(function, _HARMFUL)


def _is_from(function: Any, packages: Sequence[str]) -> bool:
    return f"{getattr(function, '__module__', None)}.".startswith(tuple(packages))


def _function(hook: Any) -> Any:
    """The function that a hook or a forward is, beneath partials and methods; or its type, if it is neither."""
    while isinstance(hook, partial) or hasattr(hook, "__func__"):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    return hook if hook is None or hasattr(hook, "__name__") else type(hook)


def _text(hook: Any) -> str:
    function = _function(hook)
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _plain(name: str) -> str:
    """A name as it is without wrappers: torch's have names with an underscore for what they wrap, PEFT's this one."""
    return ".".join(part for part in name.split(".") if not part.startswith("_") and part != "base_layer")


def _is_still(module: nn.Module, own: type) -> bool:
    """Whether a module is of the type that it was, which FSDP2 derives from."""
    kinds = type(module).__mro__
    return type(module) is own or (own in kinds and any(kind.__name__ == "FSDPModule" for kind in kinds))


def _is_token_wise(kind: type) -> bool:
    """Whether all modules of a type treat each token alone, or hand on to one that they wrap."""
    if kind in _TOKEN_WISE or f"{kind.__module__}.".startswith(("torch.distributed.", "torch._dynamo.")):
        return True
    return _is_from(kind, _ADAPTERS) and not _is_from(kind, _MIXING_ADAPTERS)


def _at(model: nn.Module, name: str) -> nn.Module | None:
    """The module that has a name in the outermost model; that may be a model inside, which has the end of the name."""
    parts = name.split(".")
    for start in range(len(parts)):
        found: Any = model
        for part in parts[start:]:
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            return found
    return None
