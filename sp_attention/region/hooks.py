"""The hooks that make an enabled model's region: around its models, their layers, modules of these, and both ends."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sp_attention.distributed import rng
from sp_attention.distributed.consistency import SAMPLING, require_same_batch
from sp_attention.errors import Refused, UnsupportedError
from sp_attention.region import direct_call
from sp_attention.region.activation_checkpoint import ActivationCheckpoints
from sp_attention.region.embedding_and_head_hooks import around_embedding, before_lm_head
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
from sp_attention.region.layer_hooks import around_gathered, around_layer
from sp_attention.region.masks import Described
from sp_attention.region.others import NOBODY, Others, OthersInModels
from sp_attention.region.plan import RegionPlan, named_arguments, tensor_names
from sp_attention.region.pytree import leaves, map_leaves, tensors
from sp_attention.region.state import RegionState
from sp_attention.region.tiled_mlp import around_tiled


@dataclass
class Hooks(RegionState):
    """The hooks of one enabled model."""

    handles: list[RemovableHandle] = field(default_factory=list)
    others: OthersInModels = field(default_factory=OthersInModels)
    checkpoints: ActivationCheckpoints = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = ActivationCheckpoints(self.context)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hooks":
        # A copied model keeps its hooks, and process groups cannot be copied.
        return self

    def install(self) -> None:
        """Hook what is planned."""
        plan, hook = self.plan, self.hook_around
        for model in plan.models:
            # Not looked up by the model when it is called, since that may be a copy of it.
            around_model = partial(self._around_model, plan.arguments[model])
            self.handles += hook(model, around_model)
            self.others.forwards[model] = direct_call.put_in_place(
                model, lambda model: not self.handles or self.has_entered(model), partial(self.run_around, around_model)
            )
        for stack in plan.stacks:
            if stack.embedding is not None:
                around = around_embedding(self, stack.embedding, stack.layers[0].module)
                self.handles += hook(stack.embedding.module, around)
            for layer in stack.layers:
                of_layer = hook(layer.module, around_layer(self, self.checkpoints, stack, layer))
                self.others.of_layers |= {handle.id: layer.name for handle in of_layer}
                self.handles += of_layer
                for gathered in layer.gathered_modules:
                    self.handles += hook(gathered.module, around_gathered(self, gathered))
        lm_head = plan.lm_head if plan.cut_before is None else plan.cut_before
        if not isinstance(lm_head, Refused):
            before = torch.compiler.disable(before_lm_head(self, lm_head.name))
            self.handles.append(lm_head.module.register_forward_pre_hook(before, with_kwargs=True))
        for module in plan.tiled_modules:
            self.handles += hook(module, around_tiled(self.mlp_tiles_of, plan.random))
        self.others.ours = {handle.id for handle in self.handles}
        self.others.know(plan)

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for model, forward in self.others.forwards.items():
            direct_call.take_away(model, forward)
        self.others.forget()

    def others_now(self) -> Others:
        """What others have put into the model."""
        return self.others.in_model(self.plan.models[0], self.plan) if self.handles else NOBODY

    @contextmanager
    def trying(self, plan: RegionPlan) -> Iterator[None]:
        """Within it the model is hooked as this plan says, instead of as it was."""
        before, was_hooked = self.plan, bool(self.handles)
        self.remove()
        self.plan = plan
        self.install()
        try:
            yield
        finally:
            self.remove()
            self.plan = before
            if was_hooked:
                self.install()

    @contextmanager
    def for_the_loss(self) -> Iterator[None]:
        """Within it nobody looks at logits, in evaluation either."""
        before, self.only_loss = self.only_loss, True
        try:
            yield
        finally:
            self.only_loss = before

    @contextmanager
    def as_in_a_forward(self) -> Iterator[None]:
        """Within it layers may be called one by one, as if the outermost model had been called."""
        others = self.others.in_model(self.plan.models[0], self.plan)
        self.forward = Forward(self.plan.models[0], None, unseen=True, others=others)
        try:
            with self.context.model((), weights=False):
                yield
        finally:
            self.forward = None

    def _around_model(
        self, seen: frozenset[str], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Generator[Any, Any, Any]:
        given = named_arguments(model, args, kwargs)
        tensors_given = [tensor for _, tensor in tensors(given)]
        unseen = bool(tensor_names(given) - seen - set(TOKENS))  # Tokens and their embeddings are alike.
        if self.forward is not None and self.forward.model is not model:
            # A model inside the one that was called.
            self.forward.unseen |= unseen
            self.forward.records |= is_on("output_hidden_states", model, given)
            forward = self.forward
            with self.context.inner_model(tensors_given):
                self.enter(model)
                output = yield None
            return None if output is None else _with_whole_records(output, forward)
        self.close_interrupted()
        others = self.others.in_model(model, self.plan)
        self._require_alike(model, given, others)
        reason = others.refused or refusal(self.plan, model, given)
        if reason is not None:
            raise UnsupportedError(reason)
        self.checkpoints.unbind()
        forward = self.forward = self._begun(model, given, unseen, others)
        try:
            with self.context.model(tensors_given, weights=is_on("output_attentions", model, given)):
                self.enter(model)
                output = yield None
        finally:
            self._entered = None
            self.forward = None
        return None if output is None else self._for_the_user(forward, output)

    def _require_alike(self, model: PreTrainedModel, given: dict[str, Any], others: Others) -> None:
        """Raise BatchError, on every rank, unless all ranks were given the same, in the same mode."""
        caches = [value for value in given.values() if isinstance(value, Cache)]
        mode: dict[str, Any] = {
            "(training)": model.training,
            "(gradients)": torch.is_grad_enabled(),
            "(only the loss)": self.only_loss,
            "(tokens in the cache)": max(map(cached_length, caches), default=0),
        }
        if others is not NOBODY:
            mode["(hooks and modules of others)"] = "; ".join([*others.told, others.refused or ""])
        if (caches or given.get("use_cache")) and not torch.is_grad_enabled():
            # A token may be sampled from what comes out. Ranks that differ in it, or in where the text ends, part here.
            mode[SAMPLING] = rng.sampling_state(model.device)
        # Masks too, where generate() made them beforehand.
        described = [(".".join(map(str, path)), leaf) for path, leaf in leaves(given) if isinstance(leaf, Described)]
        masks = {f"{name}, {field}": value for name, leaf in described for field, value in leaf.told.items()}
        require_same_batch({**given, **masks, **mode}, self.peers, model.device)

    def _begun(self, model: PreTrainedModel, given: dict[str, Any], unseen: bool, others: Others) -> Forward:
        """A forward that begins. Ranks agree on tiles, and on a seed where random numbers are drawn."""
        has_cache = any(isinstance(value, Cache) for value in given.values())
        forward = Forward(
            model,
            None if others.whole_after else stays_sharded(self.plan, model, given, self.only_loss),
            unseen,
            others=others,
            fills_caches=fills_caches(self.plan, model, given, has_cache, self.only_loss),
            has_gradients=torch.is_grad_enabled(),
            records=is_on("output_hidden_states", model, given),
        )
        if model.training or self.only_loss:
            forward.tile_counts = self.tile_counts_of_engine(forward, given)
        if model.training and self.plan.random:
            forward.seed = rng.shared_seed(model.device, self.peers)
        elif model.training:
            forward.states = rng.states(model.device)
        return forward

    def _for_the_user(self, forward: Forward, output: Any) -> Any:
        """The output of the model that was called. Raises UnsupportedError if it did not run as it was rehearsed."""
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
        output = _with_whole_records(output, forward)
        length = forward.sharded(self.plan)
        if length is not None:
            output = with_sharded_logits(output, length, self.peers, forward.lm_head_input)
        return output if forward.fills_caches else without_cache(output)


def _with_whole_records(output: Any, forward: Forward) -> Any:
    """A model's output with whole tensors in place of what transformers recorded inside of layers."""
    if isinstance(output, dict):
        for name in [name for name in output if "hidden_states" in name or "router" in name]:
            output[name] = map_leaves(lambda _, leaf: forward.recorded(leaf), output[name])
    return output
