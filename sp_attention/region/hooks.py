"""The hooks that make an enabled model's region: around its models, their layers, modules of these, and both ends."""

import warnings
from collections.abc import Generator, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sp_attention.distributed import rng
from sp_attention.distributed.consistency import require_same_batch
from sp_attention.errors import Refused, UnsupportedError
from sp_attention.region import direct_call, mixer_calls
from sp_attention.region.activation_checkpoint import ActivationCheckpoints
from sp_attention.region.cache_history import note_filling
from sp_attention.region.compared import compared
from sp_attention.region.embedding_and_head_hooks import around_embedding, before_lm_head
from sp_attention.region.extra_arguments import unread
from sp_attention.region.forward import (
    TOKENS,
    Forward,
    fills_caches,
    is_on,
    out_of_place,
    own_arguments,
    refusal,
    shapes_of_tokens,
    stays_sharded,
    with_sharded_logits,
    without_cache,
)
from sp_attention.region.hook import Hook, is_hooked
from sp_attention.region.layer_hooks import around_layer, require_undrawn
from sp_attention.region.mixer_hooks import around_gathered
from sp_attention.region.other_hooks import hooks_of_others
from sp_attention.region.others import NOBODY, Others, OthersInModels
from sp_attention.region.plan import RegionPlan, named_arguments, tensor_names
from sp_attention.region.pytree import map_leaves, tensors
from sp_attention.region.state import RegionState
from sp_attention.region.tiled_mlp import around_tiled


@dataclass
class Hooks(RegionState):
    """The hooks of one enabled model.

    inside: the layers and the modules in them. embeddings: those outside of the layers, to which others may add noise.
    told: the names of arguments that the user was told of.
    """

    handles: list[RemovableHandle] = field(default_factory=list)
    inside: set[nn.Module] = field(default_factory=set)
    embeddings: list[nn.Embedding] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    others: OthersInModels = field(default_factory=OthersInModels)
    checkpoints: ActivationCheckpoints = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = ActivationCheckpoints(self.context)

    @property
    def model(self) -> PreTrainedModel:
        """The outermost that is hooked."""
        return self.plan.models[0]

    @property
    def are_installed(self) -> bool:
        return bool(self.handles)

    def install(self) -> None:
        """Hook what is planned."""
        plan, hook = self.plan, self.hook_around
        self.inside = {one for stack in plan.stacks for layer in stack.layers for one in layer.module.modules()}
        outside = (one for one in plan.models[0].modules() if one not in self.inside)
        self.embeddings = [one for one in outside if isinstance(one, nn.Embedding)]
        for model in plan.models:
            # Not looked up by the model when it is called, since that may be a copy of it.
            around_model = partial(self._around_model, plan.arguments[model])
            self.handles += hook(model, around_model)
            direct_call.put_in_place(
                model,
                lambda model: not (self.handles or is_hooked(model)) or self.has_entered(model),
                partial(self.run_around, around_model),
            )
        for stack in plan.stacks:
            if stack.embedding is not None:
                around = around_embedding(self, stack.embedding, stack.layers[0].module)
                self.handles += hook(stack.embedding.module, around)
            for layer in stack.layers:
                self.handles += hook(layer.module, around_layer(self, self.checkpoints, stack, layer), layer.name)
                for gathered in layer.gathered_modules:
                    self.handles += hook(gathered.module, around_gathered(self, gathered))
                    for calls in gathered.calls:
                        mixer_calls.put_in_place(calls, self.context)
        lm_head = plan.lm_head if plan.cut_before is None else plan.cut_before
        if not isinstance(lm_head, Refused):
            before = Hook(before_lm_head(self, lm_head.name))
            self.handles.append(lm_head.module.register_forward_pre_hook(before, with_kwargs=True))
        for module in plan.tiled_modules:
            self.handles += hook(module, around_tiled(self.mlp_tiles_of, plan.random))
        self.others.know(plan)

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.checkpoints.leave()
        for model in self.plan.models:
            direct_call.take_away(model)
        for calls in (calls for stack in self.plan.stacks for layer in stack.layers for calls in layer.mixer_calls):
            mixer_calls.take_away(calls)

    def others_now(self) -> Others:
        """What others have put into the model."""
        return self.others.in_model(self.plan.models[0], self.plan) if self.handles else NOBODY

    @contextmanager
    def trying(self, plan: RegionPlan) -> Iterator[None]:
        """Within it the model is hooked as this plan says, instead of as it was."""
        before, was_hooked = self.plan, self.are_installed
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
        forward = self.forward if self.forward is not None and self.forward.model is not model else None
        extra = given.keys() - own_arguments(model)
        ignored = unread(extra, model.modules()) if forward is None else forward.ignored
        unseen = tensor_names(given) - seen - ignored - set(TOKENS)  # Tokens and their embeddings are alike.
        if forward is not None:
            # A model inside the one that was called.
            forward.unseen |= bool(unseen)
            forward.records |= is_on("output_hidden_states", model, given)
            with self.context.inner_model(tensors_given):
                self.enter(model)
                output = yield None
            return None if output is None else _with_whole_records(output, forward)
        reason = out_of_place(model, tensors_given)
        if reason is not None:
            raise UnsupportedError(reason)
        others = self.others.in_model(model, self.plan)
        number = self._require_alike(model, given, others)
        reason = others.refused or refusal(self.plan, model, given)
        if reason is not None:
            raise UnsupportedError(reason)
        self.checkpoints.leave()
        self._tell(unseen | (extra - ignored), model)
        forward = self.forward = self._begun(model, given, bool(unseen), ignored, others)
        try:
            weights = is_on("output_attentions", model, given)
            with self.context.model(tensors_given, weights, unread(extra, self.inside)):
                self.checkpoints.enter(model)
                self.enter(model)
                output = yield None
        finally:
            self.checkpoints.leave()
            self._entered = None
            self.forward = None
        return None if output is None else self._for_the_user(forward, output, number)

    def _require_alike(self, model: PreTrainedModel, given: dict[str, Any], others: Others) -> int:
        """A number for this forward. Raises BatchError, on every rank, unless all were given the same, in one mode."""
        told = compared(model, given, self.only_loss)
        if others is not NOBODY:
            told["(hooks and modules of others)"] = "; ".join([*others.told, others.refused or ""])
        told["(hooks of others on embeddings)"] = any(map(hooks_of_others, self.embeddings))
        # What every step of a generation is given anew, such as what an encoder returned, is looked at once.
        known = None if torch.is_grad_enabled() else self.known
        number = require_same_batch(told, self.peers, model.device, known)
        for value in given.values():
            if isinstance(value, Cache):
                note_filling(value, number)
        return number

    def _tell(self, names: Set[str], model: PreTrainedModel) -> None:
        """Say once what a batch has that makes training exact and slower."""
        if names and model.training and self.peers.rank == 0 and not self.told.issuperset(names):
            self.told.update(names)
            warnings.warn(
                f"sp_attention: {', '.join(sorted(names))}: enable() did not see such arguments in its rehearsal, and "
                f"{type(model).__name__} may read them. This is exact and takes more: each layer cuts and gathers, or "
                "logits are whole. Leave out of the batch what the model does not need.",
                stacklevel=2,
            )

    def _begun(
        self, model: PreTrainedModel, given: dict[str, Any], unseen: bool, ignored: frozenset[str], others: Others
    ) -> Forward:
        """A forward that begins. Ranks agree on tiles, and on a seed where random numbers are drawn."""
        has_cache = any(isinstance(value, Cache) for value in given.values())
        if self.length_check is not None:
            self.length_check.begin(max((length for _, length in shapes_of_tokens(given)), default=0))
        forward = Forward(
            model,
            None if others.whole_after else stays_sharded(self.plan, model, given, ignored, self.only_loss),
            unseen,
            ignored,
            others=others,
            fills_caches=fills_caches(self.plan, model, given, has_cache, self.only_loss),
            has_gradients=torch.is_grad_enabled(),
            records=is_on("output_hidden_states", model, given),
        )
        if model.training or self.only_loss:
            forward.tile_counts = self.tile_counts_of_engine(forward, given)
        if not model.training or self.context.rehearses:
            return forward
        if self.plan.random:
            forward.seed = rng.shared_seed(model.device, self.peers)
        elif unseen or any(map(hooks_of_others, self.embeddings)):
            # Noise may be added to embeddings, and time be masked: outside of the layers, where ranks draw the same.
            forward.may_draw_outside = True
            rng.make_alike(model.device, self.peers)
        else:
            forward.states = rng.states(model.device)
        return forward

    def _for_the_user(self, forward: Forward, output: Any, number: int) -> Any:
        """The output of the model that was called. Raises UnsupportedError if it did not run as it was rehearsed."""
        if forward.inside:
            raise UnsupportedError(
                f"{', '.join(sorted(forward.inside))}: the last layer was not called, unlike in the rehearsal of "
                "enable(): a model that skips layers (layerdrop, early exit) is not covered"
            )
        require_undrawn(forward.states, forward.model.device)
        output = _with_whole_records(output, forward)
        for value in output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ():
            if isinstance(value, Cache):
                note_filling(value, number)
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
