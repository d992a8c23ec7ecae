"""A causal model of transformers without memory for its weights: its parameters, and its layers by kind."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from sp_attention.cli.planning.live import without_values
from sp_attention.mixers.registry import usable
from sp_attention.region.attn_implementation import attend_by
from sp_attention.region.mixer_calls import MixerCalls, calls_in
from sp_attention.region.pytree import Path, map_leaves, tensors
from sp_attention.rehearsal.position_wise import children_of, fits, keeps_more, parts_of
from sp_attention.rehearsal.prove_tiled_mlp import may_record

META = torch.device("meta")
# Tokens of the first look, more than any convolution of a mixer is wide.
_FEW = 16


class NotPlannableError(Exception):
    """Nothing can be told of this model; the text has the reason, and what to do."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The first layer of a kind. result: what it returns; `tileable`: its parts that can be given tiles of tokens.

    heads: query and key heads that attend through transformers' interface, None if none do. calls: the mixer functions
    that its modules call.
    """

    module: nn.Module
    name: str
    result: Any
    tileable: tuple[nn.Module, ...]
    heads: tuple[int, int] | None
    calls: tuple[MixerCalls, ...]

    @property
    def parameters(self) -> int:
        return sum(one.numel() for one in self.module.parameters())


@dataclass(frozen=True, eq=False)
class MetaModel:
    """layers: the kind of each, in order. kinds: by number."""

    model: PreTrainedModel
    stack: str
    layers: tuple[int, ...]
    modules: tuple[nn.Module, ...]
    kinds: Mapping[int, Layer]

    @property
    def parameters(self) -> int:
        return sum(one.numel() for one in self.model.parameters())

    @property
    def embedding(self) -> Tensor:
        """The table of tokens."""
        embedding: Any = self.model.get_input_embeddings()
        table: Tensor = embedding.weight
        return table

    @property
    def vocabulary(self) -> int:
        weight: Tensor = self.head.weight
        return weight.shape[0]

    @property
    def head(self) -> nn.Linear:
        found: nn.Linear = self.model.get_output_embeddings()
        return found

    def base(self) -> PreTrainedModel:
        """The model without its head."""
        found: PreTrainedModel = getattr(self.model, self.model.base_model_prefix)
        return found

    def run(self, model: nn.Module, batch: int, length: int, layers: "OnLayer", **more: Any) -> Any:
        """Run the model, or its base, on so many tokens, with `layers` in place of every layer."""
        ids = torch.zeros(batch, length, dtype=torch.int64, device=META)
        with _in_place_of(self.modules, lambda number, *given: layers(self.layers[number], *given)), _WithoutValues():  # type: ignore[no-untyped-call]
            return model(input_ids=ids, use_cache=False, **more)

    def given(self, batch: int, length: int) -> "dict[int, Given]":
        """What a layer of each kind is given."""
        found: dict[int, Given] = {}

        def note(kind: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            one = found.setdefault(kind, Given(args, kwargs, hidden_path((args, kwargs), batch, length)))
            hidden = dict(tensors((args, kwargs)))[one.path]
            return with_hidden(self.kinds[kind].result, hidden)

        with torch.no_grad():
            self.run(self.base(), batch, length, note)
        return found


# Called in place of a layer with its kind, its arguments and its keyword arguments.
OnLayer = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Given:
    """The arguments of a layer; path: of the hidden states in them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: Path

    @property
    def hidden(self) -> Tensor:
        return dict(tensors((self.args, self.kwargs)))[self.path]

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found: tuple[tuple[Any, ...], dict[str, Any]] = map_leaves(
            lambda path, leaf: hidden if path == self.path else leaf, (self.args, self.kwargs)
        )
        return found

    @property
    def tables(self) -> dict[int, int]:
        """The bytes of what else it is given, by storage."""
        others = [one.untyped_storage() for path, one in tensors((self.args, self.kwargs)) if path != self.path]
        return {id(storage): storage.nbytes() for storage in others}


def hidden_path(tree: Any, batch: int, length: int) -> Path:
    """Where hidden states [batch, length, E] are first."""
    for path, tensor in tensors(tree):
        if tensor.dim() == 3 and tensor.shape[:2] == (batch, length) and tensor.is_floating_point():
            return path
    raise NotPlannableError("its layers are not given hidden states [B, S, E]")


def with_hidden(result: Any, hidden: Tensor) -> Any:
    """What a layer returned of some tokens, with other hidden states first."""
    first = hidden_path(result, 1, _FEW)
    return map_leaves(lambda path, leaf: hidden if path == first else leaf, result)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> MetaModel:
    """Raises NotPlannableError for what is no causal model, or has layers of which nothing can be told."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    except ValueError as error:
        raise NotPlannableError(f"transformers has no causal language model of type '{config.model_type}'") from error
    named = {name: one for name, one in model.named_modules() if isinstance(one, GradientCheckpointingLayer)}
    outer = {name: one for name, one in named.items() if not any(name.startswith(f"{other}.") for other in named)}
    stacks = dict.fromkeys(name.rpartition(".")[0] for name in outer)
    if len(stacks) != 1 or model.get_output_embeddings() is None:
        raise NotPlannableError(
            f"{type(model).__name__} is not one stack of layers that can be checkpointed with an LM head after it"
        )
    return _looked_at(model, next(iter(stacks)), outer)


def _looked_at(model: PreTrainedModel, stack: str, layers: Mapping[str, nn.Module]) -> MetaModel:
    signatures = [_signature(one, model.config, number) for number, one in enumerate(layers.values())]
    order = {signature: kind for kind, signature in enumerate(dict.fromkeys(signatures))}
    kinds = tuple(order[signature] for signature in signatures)
    names = {kind: name for kind, name in reversed([*zip(kinds, layers, strict=True)])}
    found: dict[int, Layer] = {}
    attending: dict[nn.Module, tuple[int, int]] = {}
    known = usable("cpu")

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Any:
        attending[module] = query.shape[1], key.shape[1]
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def look(kind: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind not in found:
            name = names[kind]
            found[kind] = _layer(layers[name], name, args, kwargs, attending, known, may_record(model))
        hidden = dict(tensors((args, kwargs)))[hidden_path((args, kwargs), 1, _FEW)]
        return with_hidden(found[kind].result, hidden)

    meta = MetaModel(model, stack, kinds, tuple(layers.values()), found)
    with ExitStack() as undo, torch.no_grad():
        attend_by(model, "sp_attention_look", attend, lambda *args, **kwargs: None, undo)
        try:
            meta.run(meta.base(), 1, _FEW, look)
        except (RuntimeError, NotImplementedError) as error:
            raise NotPlannableError(f"{type(model).__name__} looks at values of tensors: {error}") from error
    if not any(one.heads or one.calls for one in found.values()):
        raise NotPlannableError(
            f"in {type(model).__name__} nothing attends through transformers' interface, nor is a mixer known: its "
            "layers run on all tokens on every rank, so ranks save nothing"
        )
    return meta


def _layer(
    module: nn.Module,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    attending: dict[nn.Module, tuple[int, int]],
    known: Any,
    recorded: Callable[[str, nn.Module], bool],
) -> Layer:
    calls = calls_in(module, known)
    seen: dict[nn.Module, bool] = {}

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[part] = fits((args, kwargs), output)

    handles = [one.register_forward_hook(note, with_kwargs=True) for one in module.modules() if one is not module]
    try:
        result = type(module).forward(module, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    here = [one for one in module.modules() if one in attending]
    mixing = {*here, *(one.module for one in calls)}
    tileable = [
        part
        for child in children_of(module)
        if mixing.isdisjoint(child.modules())
        for part in parts_of(child, mixing)
        if keeps_more(part) and seen.get(part) and not any(recorded(*one) for one in part.named_modules(prefix="part"))
    ]
    return Layer(module, name, result, tuple(tileable), attending[here[0]] if here else None, calls)


def _signature(layer: nn.Module, config: PreTrainedConfig, number: int) -> tuple[Any, ...]:
    """What layers of one kind have in common: modules, the shapes of their weights, and what the configuration says."""
    shapes = tuple((name, tuple(one.shape)) for name, one in layer.named_parameters())
    modules = tuple((name, type(one)) for name, one in layer.named_modules())
    types = getattr(config, "layer_types", None) or []
    return modules, shapes, types[number] if number < len(types) else None


class _WithoutValues(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return without_values(func, args, kwargs or {})


@contextmanager
def _in_place_of(layers: tuple[nn.Module, ...], call: Callable[..., Any]) -> Iterator[None]:
    """Within it `call` is called in place of the forward of each layer, with its number, arguments and by name."""

    def forward(number: int, *args: Any, **kwargs: Any) -> Any:
        return call(number, args, kwargs)

    for number, layer in enumerate(layers):
        layer.forward = partial(forward, number)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
