"""The sequence-parallel region: a stack of layers, each of which works on this rank's span of the sequence.

Before a layer, whatever still has the length of the whole sequence is cut to my span; after the last, the hidden states
are gathered, or stay sharded when the sharded loss follows. Nothing is kept from one layer to the next: the length
comes with the mask, so layers that are recomputed in backward find the same.
"""

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sp_attention.agreement import require_same_batch
from sp_attention.errors import UnsupportedError
from sp_attention.exchange import Peers, gather
from sp_attention.trees import Path, map_leaves
from sp_attention.ulysses import as_mask

# Arguments of a model's forward whose meaning under sequence parallelism is known.
_COVERED = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels", "shift_labels",
    "num_items_in_batch", "use_cache", "return_dict", "output_hidden_states", "logits_to_keep",
    "start_positions", "end_positions",
}  # fmt: skip

# Those that transformers hands down through the layers although only the loss uses them.
_FOR_THE_LOSS = {"shift_labels", "num_items_in_batch"}

DROPOUT = (
    "dropout, or other random numbers in training, are not covered under sequence parallelism yet: set their "
    "probabilities to 0 in the configuration that the model is built from"
)


@dataclass(frozen=True)
class Layer:
    """One layer of the stack: which dim of which of its arguments and results is the sequence, None if none is.

    Paths start with 0 in the positional arguments and with 1 in the keyword arguments; `mask` is the mask's, and
    `handed` are those of what the layer before returned, which arrives cut.
    """

    name: str
    module: nn.Module
    mask: Path
    handed: frozenset[Path]
    arguments: Mapping[Path, int | None]
    results: Mapping[Path, int | None]


@dataclass(frozen=True)
class Region:
    """What is hooked: the layers in the order of their calls, and the models around them, outermost first.

    implementation: the key under which transformers knows our attention.
    sharded_loss: the loss function that takes logits of this rank's span, or why logits are always whole.
    untrainable: None, or why this model cannot be trained under sequence parallelism.
    """

    layers: tuple[Layer, ...]
    models: tuple[PreTrainedModel, ...]
    implementation: str
    sharded_loss: Callable[..., Tensor] | str
    untrainable: str | None = None


@dataclass
class Forward:
    """A forward in progress: the model that was called, whether its logits stay sharded, and S once it is known.

    randomness: in training, the state of the random number generators at its beginning.
    """

    model: PreTrainedModel
    stays_sharded: bool
    randomness: list[Tensor] | None
    length: int | None = None


@dataclass
class Hooks:
    """The hooks of one enabled model, and its forward in progress, if any."""

    region: Region
    peers: Peers
    forward: Forward | None = None
    handles: list[RemovableHandle] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hooks":
        # A copied model keeps its hooks, and process groups cannot be copied.
        return self

    def install(self) -> None:
        for model in self.region.models:
            self._hook(model, self._before_model, self._after_model)
        for layer in self.region.layers:
            self._hook(layer.module, self._before_layer(layer))
        last = self.region.layers[-1]
        self._hook(last.module, after=self._after_last_layer(last))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(
        self, module: nn.Module, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
    ) -> None:
        if before is not None:
            self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            # First, so that the hooks of others see what the rest of the model sees; always, so that an error within
            # leaves no forward in progress behind.
            self.handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True))

    def _before_model(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.forward is not None and self.forward.model is not model:
            return  # A model inside the one that was called.
        given = _named_arguments(model, args, kwargs)
        mode = {"(training)": model.training, "(gradients)": torch.is_grad_enabled()}
        require_same_batch({**given, **mode}, self.peers, model.device)
        reason = self._refusal(model, given)
        if reason is not None:
            raise UnsupportedError(reason)
        randomness = random_state(model.device) if model.training else None
        self.forward = Forward(model, self._may_stay_sharded(model, given), randomness)

    def _may_stay_sharded(self, model: PreTrainedModel, given: Mapping[str, Any]) -> bool:
        """Whether our loss, and nothing but it, will see the logits."""
        kept, tokens = given.get("logits_to_keep"), given.get("input_ids", given.get("inputs_embeds"))
        labels = [given[name] for name in ("labels", "shift_labels") if name in given]
        return (
            model is self.region.models[0]
            and model.training
            and "labels" in given
            and tokens is not None
            and all(isinstance(one, Tensor) and one.shape == tokens.shape[:2] for one in labels)
            and (kept is None or (isinstance(kept, int) and kept == 0))
            and not isinstance(self.region.sharded_loss, str)
            # Such a mask does not remember for a recomputation that the logits stayed sharded.
            and not (isinstance(mask := given.get("attention_mask"), Tensor) and mask.dim() == 4)
            # The user may have set another since.
            and model.loss_function is self.region.sharded_loss
        )

    def _refusal(self, model: PreTrainedModel, given: Mapping[str, Any]) -> str | None:
        """Why this forward cannot be exact under sequence parallelism, None when it can."""
        if any(inner.config._attn_implementation != self.region.implementation for inner in self.region.models):
            return "the attention implementation was changed after enable(): call handle.disable() before you change it"
        if given.get("use_cache") or "past_key_values" in given:
            return (
                "a key/value cache (generate(), use_cache=True, past_key_values) is not covered under sequence "
                "parallelism yet: call handle.disable() before generate(), or pass use_cache=False"
            )
        switches = {name: value for name, value in vars(model.config).items() if isinstance(value, bool)} | dict(given)
        for name, value in switches.items():
            if name.startswith("output_") and name != "output_hidden_states" and value:
                return f"{name}=True is not covered under sequence parallelism yet: it would give one rank's part"
        for name in given:
            if name not in _COVERED and not name.startswith("output_"):
                return f"the argument {name!r} of {type(model).__name__} is not covered under sequence parallelism yet"
        if switches.get("output_hidden_states") and switches.get("return_dict") is False:
            return "output_hidden_states needs return_dict=True under sequence parallelism"
        return self.region.untrainable if model.training else None

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        forward = self.forward
        if forward is None:
            return None
        if forward.model is model:
            self.forward = None
            if output is not None and forward.randomness is not None:
                self._require_no_randomness(forward.model, forward.randomness)
        if isinstance(output, dict) and output.get("hidden_states") is not None and forward.length is not None:
            output["hidden_states"] = tuple(self._whole(state, forward.length) for state in output["hidden_states"])
        return _without_cache(output) if forward.model is model else output

    def _require_no_randomness(self, model: PreTrainedModel, before: list[Tensor]) -> None:
        """Refuse what was not there in the rehearsal: a dropout that was switched on or added since."""
        if not all(map(torch.equal, random_state(model.device), before)):
            raise UnsupportedError(DROPOUT)

    def _whole(self, state: Tensor | None, length: int) -> Tensor | None:
        """A hidden state [B, S | s, E] as the user may see it; those recorded inside the region are my span only."""
        if state is None or (state.dim() == 3 and state.shape[1] == length):
            return state
        if state.dim() != 3:
            raise UnsupportedError(f"hidden states of {state.dim()} dims are not covered yet")
        return gather(state, length, self.peers)

    def _before_layer(self, layer: Layer) -> Callable[..., Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mask = as_mask(_leaf((args, kwargs), layer.mask), layer.name)
            length, span = mask.query_length, self.peers.span(mask.query_length)
            if self.forward is not None:
                self.forward.length = length
                # Kept with the mask, since a layer that is recomputed in backward must do as it did.
                mask.once("stays sharded", lambda: self._stays_sharded)

            def cut(path: Path, leaf: Any) -> Any:
                if path == layer.mask:
                    return mask
                if isinstance(leaf, Cache):
                    return None  # It would hold one rank's part, and the model does not return it.
                if not isinstance(leaf, Tensor) or length < self.peers.size or path[1] in _FOR_THE_LOSS:
                    return leaf
                dim = layer.arguments.get(path, -1)
                if dim is None or (dim == -1 and length not in leaf.shape):
                    return leaf
                if path in layer.handed and leaf.shape[dim] == len(span):
                    return leaf
                if path not in layer.handed and dim >= 0 and leaf.shape[dim] == length:
                    return leaf.narrow(dim, span.start, len(span)).contiguous()
                raise UnsupportedError(
                    f"{layer.name}: the argument {'.'.join(map(str, path[1:]))} {list(leaf.shape)} is not what "
                    f"enable() saw in its rehearsal; it is not of {length} tokens and cannot be cut"
                )

            return map_leaves(cut, (args, kwargs))

        return before

    def _after_last_layer(self, layer: Layer) -> Callable[..., Any]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if output is None:
                return None
            mask = as_mask(_leaf((args, kwargs), layer.mask), layer.name)
            if mask.query_length < self.peers.size or mask.once("stays sharded", lambda: self._stays_sharded):
                return output

            def whole(path: Path, leaf: Any) -> Any:
                dim = layer.results.get(path)
                return leaf if dim is None else gather(leaf, mask.query_length, self.peers, dim)

            return map_leaves(whole, output)

        return after

    @property
    def _stays_sharded(self) -> bool:
        return self.forward is not None and self.forward.stays_sharded


def random_state(device: torch.device) -> list[Tensor]:
    """The states of Python's and torch's generators, and of the device's; unequal when numbers were drawn between."""
    states = [torch.tensor(random.getstate()[1]), torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _leaf(tree: Any, path: Path) -> Any:
    """What stands at `path`, None where the path ends early."""
    for key in path:
        if not (key in tree if isinstance(tree, dict) else isinstance(key, int) and key < len(tree)):
            return None
        tree = tree[key]
    return tree


def _named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, without those that are None."""
    signature = inspect.signature(model.forward)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return {name: value for name, value in named.items() if value is not None}


def _without_cache(output: Any) -> Any:
    """A model's output without the key/value cache that it made on its own; it stayed empty."""
    if isinstance(output, dict) and isinstance(output.get("past_key_values"), Cache):
        return type(output)(**{name: value for name, value in output.items() if name != "past_key_values"})
    if isinstance(output, tuple):
        return tuple(item for item in output if not isinstance(item, Cache))
    return output
