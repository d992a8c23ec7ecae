"""The hooks that make an enabled model's region: around its models, its layers and their parts, and its two ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sp_attention.distributed import rng
from sp_attention.distributed.consistency import SAMPLING, require_same_batch
from sp_attention.errors import UnsupportedError
from sp_attention.region.activation_checkpoint import ActivationCheckpoints
from sp_attention.region.embedding_and_head_hooks import embedding_hooks, head_hook
from sp_attention.region.forward import (
    TOKENS,
    Forward,
    fills_caches,
    is_on,
    refusal,
    stays_sharded,
    with_sharded_logits,
    without_cache,
)
from sp_attention.region.kv_cache import cached_length
from sp_attention.region.layer_hooks import layer_hooks, part_hooks
from sp_attention.region.masks import Described
from sp_attention.region.plan import Stack, named_arguments, tensor_names
from sp_attention.region.pytree import leaves, map_leaves, tensors
from sp_attention.region.state import RegionState
from sp_attention.region.tiled_mlp import tile_module


@dataclass
class Hooks(RegionState):
    """The hooks of one enabled model."""

    handles: list[RemovableHandle] = field(default_factory=list)
    checkpoints: ActivationCheckpoints = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = ActivationCheckpoints(self.current)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hooks":
        # A copied model keeps its hooks, and process groups cannot be copied.
        return self

    def install(self) -> None:
        for model in self.region.models:
            # Not looked up by the model when it is called, since that may be a copy of it.
            self._hook(model, partial(self._before_model, self.region.arguments[model]), self._after_model)
        for stack in self.region.stacks:
            if stack.embedding is not None:
                hooks = embedding_hooks(self, stack.embedding, stack.layers[0].module)
                self._hook(stack.embedding.module, *hooks)
            for layer in stack.layers:
                self._hook(layer.module, *layer_hooks(self, self.checkpoints, stack, layer))
                for part in layer.parts:
                    self._hook(part.module, *part_hooks(self, part))
        head = self.region.cut or self.region.head
        if not isinstance(head, str):
            hook = torch.compiler.disable(head_hook(self, head.name))
            self.handles.append(head.module.register_forward_pre_hook(hook, with_kwargs=True))
        for module in self.region.pieces:
            self.handles += tile_module(module, self.pieces_of, self.region.random)

    @contextmanager
    def for_the_loss(self) -> Iterator[None]:
        """Within it nobody looks at logits, in evaluation either."""
        before, self.only_loss = self.only_loss, True
        try:
            yield
        finally:
            self.only_loss = before

    def hook_instead(self, stacks: tuple[Stack, ...]) -> None:
        """Hook these stacks in place of the region's."""
        self.remove()
        self.region = replace(self.region, stacks=stacks)
        self.install()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _hook(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        # A compiled model runs these as they are, and compiles what is between them.
        before, after = torch.compiler.disable(before), torch.compiler.disable(after)
        self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        # First, so that the hooks of others see what the rest of the model sees; always, so that an error within
        # leaves nothing in progress behind.
        self.handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True))

    def _before_model(
        self, seen: frozenset[str], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = named_arguments(model, args, kwargs)
        tensors_given = frozenset(id(tensor) for _, tensor in tensors(given))
        unseen = bool(tensor_names(given) - seen - set(TOKENS))  # Tokens and their embeddings are alike.
        if self.forward is not None and self.forward.model is not model:
            self.current.given |= tensors_given
            # A model inside the one that was called.
            self.forward.unseen |= unseen
            self.forward.records |= is_on("output_hidden_states", model, given)
            return
        caches = [value for value in given.values() if isinstance(value, Cache)]
        mode: dict[str, Any] = {
            "(training)": model.training,
            "(gradients)": torch.is_grad_enabled(),
            "(only the loss)": self.only_loss,
            "(tokens in the cache)": max(map(cached_length, caches), default=0),
        }
        if (caches or given.get("use_cache")) and not torch.is_grad_enabled():
            # A token may be sampled from what comes out. Ranks that differ in it, or in where the text ends, part here.
            mode[SAMPLING] = rng.sampling_state(model.device)
        # Masks too, where generate() made them beforehand.
        described = [(".".join(map(str, path)), leaf) for path, leaf in leaves(given) if isinstance(leaf, Described)]
        masks = {f"{name}, {part}": value for name, leaf in described for part, value in leaf.told.items()}
        require_same_batch({**given, **masks, **mode}, self.peers, model.device)
        reason = refusal(self.region, model, given)
        if reason is not None:
            raise UnsupportedError(reason)
        self.current.call, self.current.weights = None, is_on("output_attentions", model, given)
        self.current.given, self.current.is_known, self.current.kept = tensors_given, True, {}
        self.checkpoints.unbind()
        self.forward = Forward(
            model,
            stays_sharded(self.region, model, given, self.only_loss),
            unseen,
            caches=fills_caches(self.region, model, given, bool(caches), self.only_loss),
            records=is_on("output_hidden_states", model, given),
        )
        if model.training or self.only_loss:
            self.forward.counts = self.counts_of_engine(self.forward, given)
        if model.training and self.region.random:
            self.forward.seed = rng.shared_seed(model.device, self.peers)
        elif model.training:
            self.forward.states = rng.states(model.device)

    def _after_model(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        forward = self.forward
        if forward is None:
            return None
        if forward.model is model:
            self.forward, self.current.is_known = None, False
        if output is None:
            return None
        if forward.model is model:
            if forward.inside:
                raise UnsupportedError(
                    f"{', '.join(sorted(forward.inside))}: the last layer was not called, unlike in the rehearsal of "
                    "enable(): a model that skips layers (layerdrop, early exit) is not covered"
                )
            before = forward.states
            if before is not None and not rng.are_equal(rng.states(forward.model.device), before):
                raise UnsupportedError(
                    "random numbers were drawn in training, unlike in the rehearsal of enable(): switch dropout on "
                    "before enable()"
                )
        if isinstance(output, dict):
            for name in [name for name in output if "hidden_states" in name or "router" in name]:
                output[name] = map_leaves(lambda _, leaf: forward.recorded(leaf), output[name])
        if forward.model is not model:
            return output
        length = forward.sharded(self.region)
        if length is not None:
            output = with_sharded_logits(output, length, self.peers, forward.held)
        return output if forward.caches else without_cache(output)
