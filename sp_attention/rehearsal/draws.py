"""Where a model draws random numbers in training, such as those of dropout, and what it gives in training without them.

A forward as users run it tells whether there are any. If so, one in which draws are harmless is what the sharded model
is held to, and one in which all is skipped that chance may skip tells what depends on them. How ranks draw is decided
by what is drawn:

- of tokens, such as dropout: each rank its own, within layers;
- of no token, such as whether a layer skips itself, or a sample its residual: all ranks the same. A layer that draws
  both kinds is given whole tensors;
- outside of the layers, and within modules that are given whole tensors: all ranks the same anyway. Where the model
  draws between its layers, or skips some by chance, each cuts and gathers on its own.

What kernels of others draw, and no operation of torch, is compared as it comes, from the same seed: what is not the
same then is gathered, and in the end refused.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sp_attention.distributed import rng
from sp_attention.region.harmless_draws import HarmlessDraws
from sp_attention.region.sequence_dims import Extent
from sp_attention.rehearsal.findings import EVERYTHING, Findings, LayerFindings
from sp_attention.rehearsal.trace import with_gradients


@dataclass(frozen=True)
class Draws:
    """Where a model draws random numbers in training: at all, between which stacks' layers, after the last layer.

    alike: the layers that draw numbers that are of no token, and none else. whole: those that draw both kinds, or in
    which draws of tokens decide whether anything attends.
    """

    anywhere: bool = False
    between: frozenset[str] = frozenset()
    after: bool = False
    alike: frozenset[nn.Module] = frozenset()
    whole: frozenset[nn.Module] = frozenset()

    def harmless(self) -> AbstractContextManager[Any]:
        """Within it the model draws nothing that differs between a whole and a sharded forward."""
        return HarmlessDraws() if self.anywhere else nullcontext()

    def applied(self, findings: Findings) -> Findings:
        """The findings with what follows from the draws."""
        if not self.anywhere:
            return findings

        def told(found: LayerFindings) -> LayerFindings:
            if found.layer.module in self.whole:
                return replace(found, gathers=EVERYTHING)
            return replace(found, layer=replace(found.layer, draws_alike=found.layer.module in self.alike))

        stacks = {name: tuple(map(told, layers)) for name, layers in findings.stacks.items()}
        # Dropout may come between the embeddings and the first layer.
        return replace(findings, stacks=stacks, separate=findings.separate | self.between, embeddings={})


@dataclass(frozen=True)
class TrainingRun:
    """What the whole model gives for `inputs` in training, where what it draws is harmless, with its gradients."""

    inputs: Mapping[str, Any]
    draws: Draws
    output: Any
    gradients: Tensor


def trained(
    model: PreTrainedModel, findings: Findings, inputs: Mapping[str, Any], attending: frozenset[nn.Module]
) -> TrainingRun:
    """A forward and a backward in training, and where random numbers are drawn; `attending`: what attends by us."""
    model.train()
    drawing = _Drawing(findings, attending, model.device)
    with drawing.watched(model):
        output, gradients = with_gradients(model, inputs)
    if not drawing.draws_anything:
        return TrainingRun(inputs, Draws(), output, gradients)
    harmless = _Drawing(findings, attending, model.device)
    with harmless.watched(model), HarmlessDraws(harmless.note):
        output, gradients = with_gradients(model, inputs)
    skipping = _Drawing(findings, attending, model.device)
    others = [drawing]
    # Such a forward never comes in training, so it need not give anything.
    with suppress(Exception), skipping.watched(model), HarmlessDraws(skips=True):
        model(**inputs)
        others.append(skipping)
    return TrainingRun(inputs, _draws(findings, harmless, others), output, gradients)


def _draws(findings: Findings, harmless: "_Drawing", others: list["_Drawing"]) -> Draws:
    """What a forward in which draws are harmless, and others, tell together."""
    layers = {found.layer.module: name for name, stack in findings.stacks.items() for found in stack}
    # In evaluation all layers were called.
    skipped = {name for layer, name in layers.items() for one in (harmless, *others) if not one.calls[layer]}
    depends = {layer for layer in layers for one in others if one.calls[layer] and one.attends_unlike(harmless, layer)}
    alike = {layer for layer in layers if harmless.of_none[layer]}
    of_tokens = {layer for layer in layers if harmless.of_tokens[layer]}
    whole = (alike & of_tokens) | (depends - alike)
    return Draws(
        True,
        # In the others layers may be missing, and what is drawn for them may seem to come behind the last.
        frozenset(skipped | harmless.between),
        harmless.drawn_since,
        frozenset(alike - whole),
        frozenset(whole),
    )


@dataclass
class _Drawing:
    """Watches a forward for where it draws.

    calls: of layers, and of what attends. of_tokens, of_none: how often each layer drew for tokens, or for none.
    between: the stacks that the model draws between the layers of.
    draws_anything: in the whole forward. drawn_since: something was drawn since the last layer.
    """

    findings: Findings
    attending: frozenset[nn.Module]
    device: torch.device
    calls: Counter[nn.Module] = field(default_factory=Counter)
    of_tokens: Counter[nn.Module] = field(default_factory=Counter)
    of_none: Counter[nn.Module] = field(default_factory=Counter)
    between: set[str] = field(default_factory=set)
    draws_anything: bool = False
    drawn_since: bool = False
    _layer: tuple[str, nn.Module] | None = None
    _left: str | None = None
    _states: list[Tensor] = field(default_factory=list)
    _in_gathered: int = 0
    _in_attention: int = 0

    def attends_unlike(self, other: "_Drawing", layer: nn.Module) -> bool:
        """Whether attention was called another number of times within a layer."""
        return any(self.calls[one] != other.calls[one] for one in layer.modules() if one in self.attending)

    def note(self, shape: torch.Size) -> None:
        """Something of this shape was drawn."""
        if not self._states or self._in_gathered:  # Not in a forward, or by all ranks alike.
            return
        if self._layer is None:
            self.drawn_since = True
            return
        stack, layer = self._layer
        extent = self.findings.extents[stack]
        # Kernels attend to parts of the sequence.
        is_of_none = shape.numel() <= extent.batch or (not self._in_attention and _is_of_channels(shape, extent))
        (self.of_none if is_of_none else self.of_tokens)[layer] += 1

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Within it forwards of the model are watched."""
        first: list[Tensor] = []

        def begin(*_: Any) -> None:
            self._states = rng.states(self.device)
            first.extend(self._states)

        def end(*_: Any) -> None:
            now = rng.states(self.device)
            self.drawn_since |= not rng.are_equal(self._states, now)
            self.draws_anything = not rng.are_equal(first, now)
            self._states = []

        def into_attention(module: nn.Module, _: Any) -> None:
            self.calls[module] += 1
            self._in_attention += 1

        def out_of_attention(*_: Any) -> None:
            self._in_attention -= 1

        def into_gathered(*_: Any) -> None:
            self._in_gathered += 1

        def out_of_gathered(*_: Any) -> None:
            self._in_gathered -= 1

        handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
        for module in self.attending:
            handles.append(module.register_forward_pre_hook(into_attention))
            handles.append(module.register_forward_hook(out_of_attention))
        for name, layers in self.findings.stacks.items():
            for found in layers:
                handles += self._around_layer(name, found.layer.module)
                # What shares its work is on a rank's tokens, as the rest of the layer is.
                for mixer in (one for one in found.planned().gathered_modules if not one.calls):
                    handles.append(mixer.module.register_forward_pre_hook(into_gathered))
                    handles.append(mixer.module.register_forward_hook(out_of_gathered))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _around_layer(self, stack: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(*_: Any) -> None:
            self.calls[module] += 1
            if not self._states:
                return
            self.drawn_since |= not rng.are_equal(self._states, rng.states(self.device))
            if self.drawn_since and self._left == stack:
                self.between.add(stack)
            self._layer = stack, module

        def leave(*_: Any) -> None:
            self._layer, self._left, self.drawn_since = None, stack, False
            if self._states:
                self._states = rng.states(self.device)

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _is_of_channels(shape: torch.Size, extent: Extent) -> bool:
    """Whether numbers of this shape are alike for all tokens: [B, 1, E], and not [n, E] of the tokens of an expert."""
    of_rows = len(shape) > 2 and shape[0] in (1, extent.batch)
    return of_rows and {extent.length, extent.batch * extent.length}.isdisjoint(shape)
