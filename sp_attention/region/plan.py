"""What is hooked in a model, as data: stacks of layers, modules in them, and the models around them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sp_attention.errors import Refused
from sp_attention.loss.tiled_loss import LMHead
from sp_attention.region.flags import Flag
from sp_attention.region.kv_cache import HeadCounts
from sp_attention.region.masks import DOCUMENTS
from sp_attention.region.mixer_calls import MixerCalls
from sp_attention.region.pytree import Path, tensors
from sp_attention.region.sequence_dims import Dims
from sp_attention.ulysses.head_groups import HeadGroups

# What transformers hands down through the layers although only the loss uses it.
FOR_THE_LOSS = {"labels", "shift_labels", "num_items_in_batch", "start_positions", "end_positions"}
LOGITS_ARE_WHOLE = Refused("logits are whole")
# Layers are given these as they are.
NEVER_CUT = FOR_THE_LOSS | DOCUMENTS


@dataclass(frozen=True)
class GatheredModule:
    """A module of a layer that is given whole tensors, and whose results are cut to my span.

    attends: with a cache each rank does its heads of it. calls: the mixer functions in it that share their work, so
    that it is given my span; whole tensors where spans are too short to tell, and where a cache is filled, unless it
    `fills_caches` from spans too.
    """

    name: str
    module: nn.Module
    arguments: Dims
    results: Dims
    attends: bool = False
    calls: tuple[MixerCalls, ...] = ()
    fills_caches: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer of a stack: which dim of which of its arguments and results is the sequence, None if none is.

    Paths start with 0 in the positional arguments and with 1 in the keyword arguments.
    hidden: the path of the hidden states, which tell B and S.
    handed: the arguments that an earlier layer returned, which arrive cut. hands: the results that a later one takes.
    masks: where a description of the mask is given, or in its place a mask tensor of the user's own.
    heads: how many heads attend in it, by whether to another sequence, and the number of key heads.
    gathered: the whole layer is a mixer: it runs on whole tensors, and only what is between the layers is cut.
    flags: those with which it was called in the rehearsal. names: those of its arguments, in their order.
    takes_last: of what is about the tokens in a cache too, such as rotary tables, it takes the end for its own tokens.
    draws_alike: the random numbers that it draws in training are of no token, such as whether it skips itself, so all
    ranks draw the same.
    """

    name: str
    module: nn.Module
    hidden: Path
    handed: frozenset[Path]
    arguments: Dims
    hands: frozenset[Path]
    results: Dims
    gathered_modules: tuple[GatheredModule, ...]
    masks: frozenset[Path]
    heads: HeadCounts = field(default_factory=dict)
    gathered: bool = False
    takes_last: bool = False
    draws_alike: bool = False
    flags: frozenset[Flag] = frozenset()
    names: tuple[str, ...] = ()

    @property
    def mixer_calls(self) -> tuple[MixerCalls, ...]:
        """Those of the modules in it whose mixer functions share their work."""
        return tuple(calls for gathered in self.gathered_modules for calls in gathered.calls)


@dataclass(frozen=True)
class Embedding:
    """A table of which each rank looks up its own tokens only, since they go straight into the first layer."""

    name: str
    module: nn.Embedding


@dataclass(frozen=True)
class Stack:
    """Layers in the order of their calls.

    separate: the model works on what is between the layers, so each cuts its arguments and gathers its results.
    """

    name: str
    layers: tuple[Layer, ...]
    separate: bool = False
    embedding: Embedding | None = None


@dataclass(frozen=True)
class NamedModule:
    """A module, and its name in the outermost model."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class RegionPlan:
    """What is hooked: the stacks, and the models around them, outermost first.

    implementation: the key under which transformers knows our attention, None when the model attends on its own.
    sharded_loss: the loss function that takes logits of this rank's span, or why logits are always whole.
    before_loss: the stack whose hidden states stay sharded for that loss. cut_before: the LM head that is given my span
    of hidden states, where these are whole before it.
    lm_head: what makes logits of them in tiles, or why all logits are made at once.
    tiled_modules: the modules of layers that are given tiles of tokens, of `mlp_tile` tokens at most.
    offloads: what checkpoints of layers keep for backward is in CPU memory until then.
    arguments: for each model, the names of the tensor arguments that the rehearsal gave to it.
    chunk: how many tokens feed-forwards take at a time on their own, 0 for all; enabled they take all of a span.
    head_groups: how many groups of heads attend one after the other, None for all at once.
    random: in training the model draws random numbers (dropout).
    caches: what key/value caches hold, as text for people, or why they are refused.
    """

    stacks: tuple[Stack, ...]
    models: tuple[PreTrainedModel, ...]
    arguments: Mapping[nn.Module, frozenset[str]]
    implementation: str | None
    sharded_loss: Callable[..., Tensor] | Refused
    before_loss: str | None = None
    cut_before: NamedModule | None = None
    lm_head: LMHead | Refused = LOGITS_ARE_WHOLE
    tiled_modules: tuple[nn.Module, ...] = ()
    mlp_tile: int = 1
    offloads: bool = False
    chunk: int = 0
    head_groups: HeadGroups | None = None
    random: bool = False
    caches: str | Refused = "are taken to work: nothing was rehearsed"


# What models take that pass on whatever they are given, to another one than the class that they derive from.
_USUAL = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids", "use_cache"})


def names_taken(model: nn.Module) -> frozenset[str]:
    """The names of the arguments that a model's forward takes; of `forward(*args, **kwargs)` those of its class."""
    kind: Any = type(model)  # A class with __hash__ of its own is nothing that can be hashed to mypy.
    return _named(model.forward) or names_of_class(kind)


@cache
def names_of_class(kind: Any) -> frozenset[str]:
    """The names of the arguments of the first forward that names some, of a class and those that it derives from."""
    inherited = (_named(vars(base)["forward"]) for base in kind.__mro__ if "forward" in vars(base))
    return next(filter(None, inherited), _USUAL)


def _named(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)) - {"self"}


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, without those that are None."""
    signature = inspect.signature(model.forward)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return {name: value for name, value in named.items() if value is not None}


def tensor_names(named: Mapping[str, Any]) -> frozenset[str]:
    """The names of the arguments that are or hold tensors, but for those that are never cut."""
    return frozenset(name for name, value in named.items() if any(tensors(value))) - NEVER_CUT


def outermost_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost models of transformers in a module, by their names in it. Raises ValueError if there are none."""
    found: dict[str, PreTrainedModel] = {}
    within: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module not in within:
            found[name] = module
            within.update(module.modules())
    if not found:
        raise ValueError(f"{type(model).__name__} is not a transformers model, nor does it contain one")
    return found
