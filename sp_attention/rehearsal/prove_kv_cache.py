"""Prove that a sharded model goes on from a key/value cache as the whole one does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sp_attention.distributed.consistency import attempted
from sp_attention.distributed.peers import Peers
from sp_attention.errors import BackendError, Refused, UnsupportedError
from sp_attention.region.attn_implementation import Own, attend_as, own_attention
from sp_attention.region.forward import TOKENS
from sp_attention.region.hooks import Hooks
from sp_attention.region.kv_cache import told_of
from sp_attention.region.plan import Layer, RegionPlan, Stack, named_arguments, names_taken
from sp_attention.region.pytree import Path, map_leaves, tensors
from sp_attention.region.sequence_dims import Dims, Extent, dims
from sp_attention.rehearsal.dummy_tensors import Inputs
from sp_attention.rehearsal.trace import Trace, same

# What a model gives for a batch in steps, and the cache that it goes on from.
Continued = tuple[Tensor, Cache]


@dataclass(frozen=True)
class _Batch:
    """What a model is given: its inputs by name, `name` the tokens among them.

    along: where those are in each input, None in what is of something else. extent: B and S of them.
    """

    inputs: Inputs
    name: str
    along: Dims
    extent: Extent

    def part(self, start: int, stop: int) -> Inputs:
        """The inputs for the tokens [start, stop); masks are of those before them too."""

        def cut(path: Path, leaf: Any) -> Any:
            along = self.along.get(path)
            before = 0 if str(path[0]).endswith("attention_mask") else start
            return leaf if along is None else along.cut(leaf, before, stop, self.extent)

        cut_inputs: Inputs = map_leaves(cut, self.inputs)
        return cut_inputs


def prove_caches(
    model: PreTrainedModel, hooks: Hooks, plan: RegionPlan, own: Own, traces: tuple[Trace, Trace]
) -> RegionPlan:
    """The plan with caches, if the sharded model goes on from one as it does attending on its `own`, or why not.

    Where the model takes none, it is the models in it that generate with one, if any, which have to. `traces`: a narrow
    and a wide one, in which each of them shows what it is given.
    """
    takers = _takers(plan.models)
    if not takers:
        return replace(plan, caches=f"are none: {type(model).__name__} takes none")
    # Put back after the rehearsal. Forwards with a cache compare the ranks' generators, which need not be alike yet.
    torch.manual_seed(0)
    shares = any(layer.mixer_calls for stack in plan.stacks for layer in stack.layers)
    expected = _expected_of(takers, own, own_attention(model), traces, hooks.peers, shares)
    if isinstance(expected, Refused):
        return replace(plan, caches=expected)

    def compare() -> str:
        told = []
        for taker, step, output in expected:
            continued, cache = step()
            if not same(continued, output):
                raise UnsupportedError(f"{type(taker).__name__} sharded gives other numbers with a filled cache")
            told.append(told_of(cache))
        return "; ".join(dict.fromkeys(told))

    for fills, takes_last, keeps_all in product((True, False) if shares else (False,), (False, True), (False, True)):
        stacks = tuple(_with_caches(stack, takes_last, keeps_all, fills) for stack in plan.stacks)
        with hooks.trying(replace(plan, stacks=stacks, caches="are being proven")):
            try:
                caches = attempted(compare, hooks.peers, model.device)
            except BackendError as error:
                caches = Refused(str(error))
        if fills and isinstance(caches, str):
            caches += "; mixers fill theirs by heads"
        plan_with = replace(plan, stacks=stacks, caches=caches)
        if not isinstance(caches, Refused):
            break
    return plan_with


def _expected_of(
    takers: list[PreTrainedModel], own: Own, ours: Own, traces: tuple[Trace, Trace], peers: Peers, shares: bool
) -> list[tuple[PreTrainedModel, Callable[[], Continued], Tensor]] | Refused:
    """For each model that takes a cache, steps in which it goes on from one, and what it gives on its own in them."""
    expected: list[tuple[PreTrainedModel, Callable[[], Continued], Tensor]] = []
    attend_as(own)
    try:
        for taker in takers:
            alone = _alone(taker, traces, peers, shares)
            if isinstance(alone, Refused):
                return Refused(f"{type(taker).__name__} does not go on from a cache: {alone.reason}")
            expected += [(taker, *one) for one in alone]
    finally:
        attend_as(ours)
    return expected


def _takers(models: tuple[PreTrainedModel, ...]) -> list[PreTrainedModel]:
    """The models that go on from caches of their own: the outermost, or else those in it that generate."""
    takers: list[PreTrainedModel] = []
    for model in models:  # outermost first
        takes = not names_taken(model).isdisjoint({"use_cache", "past_key_values"})
        is_inside = any(model is module for taker in takers for module in taker.modules())
        if takes and not is_inside and (model is models[0] or model.can_generate()):
            takers.append(model)
    return takers


def _alone(
    model: PreTrainedModel, traces: tuple[Trace, Trace], peers: Peers, shares: bool
) -> list[tuple[Callable[[], Continued], Tensor]] | Refused:
    """Steps in which a model goes on from a cache, and its output in them; or why it does so in none.

    So many tokens that the ranks share them, one token, and again so many; or where the model itself does not go on
    with several tokens, all but one, and that: so too if its mixers share their work (`shares`), which they do not of
    so few. Some models do so without a mask only.
    """
    refused = Refused("the rehearsal of enable() does not show what tokens it is given")
    found: list[tuple[Callable[[], Continued], Tensor]] = []
    for several in (True, False):
        for batch in [] if found and not shares else _batches(model, traces):
            length = batch.extent.length
            stops = (peers.size, peers.size + 1, length) if several else (length - 1, length)
            step = partial(_in_steps, model, batch, stops)
            continued = attempted(step, peers)
            if not isinstance(continued, Refused):
                found.append((step, continued[0]))
                break
            refused = continued
    return found or refused


def _batches(model: PreTrainedModel, traces: tuple[Trace, Trace]) -> Iterator[_Batch]:
    """What a model was given in a narrow trace: as it was, without masks, and with what its encoder returned."""
    if not all(trace.calls[model] for trace in traces):
        return
    given, other = (named_arguments(model, *trace.calls[model][0].inputs) for trace in traces)
    name = next((name for name in TOKENS if name in given), None)
    if name is None:
        return
    extents = [Extent(*inputs[name].shape[:2]) for inputs in (given, other)]
    unmasked = {one: value for one, value in given.items() if not one.endswith("attention_mask")}
    kinds = [given, unmasked]
    encoded = traces[0].calls.get(model.get_encoder()) if getattr(model.config, "is_encoder_decoder", False) else None
    if encoded:
        kinds.append({**given, "encoder_outputs": encoded[0].output})
    for inputs in kinds:
        yield _Batch({**inputs, "use_cache": True}, name, dims(inputs, other, *extents), extents[0])


def _with_caches(stack: Stack, takes_last: bool, keeps_all: bool, fills: bool) -> Stack:
    """The stack with layers of another `takes_last`.

    keeps_all: caches are whole on every rank, for models that work on keys and values that are cached. fills: mixers
    fill them from spans.
    """

    def kept(layer: Layer) -> Layer:
        heads = dict.fromkeys(layer.heads, 0) if keeps_all else layer.heads
        mixers = tuple(replace(one, fills_caches=fills and bool(one.calls)) for one in layer.gathered_modules)
        return replace(layer, heads=heads, takes_last=takes_last, gathered_modules=mixers)

    return replace(stack, layers=tuple(map(kept, stack.layers)))


def _in_steps(model: PreTrainedModel, batch: _Batch, stops: tuple[int, ...]) -> Continued:
    """What a model gives for the real tokens of a batch, some at a time, and the cache that it goes on from."""
    outputs: list[Tensor] = []
    caches: Inputs = {}
    for start, stop in pairwise((0, *stops)):
        output = model(**batch.part(start, stop) | caches)
        caches = {one: value for one, value in output.items() if isinstance(value, Cache)}
        if not caches:
            raise UnsupportedError("it returns no cache of transformers' kind")
        outputs.append(next(tensor for path, tensor in tensors(output) if path[0] in ("logits", "last_hidden_state")))
    output = torch.cat(outputs, 1)
    padding = batch.inputs.get("decoder_attention_mask" if "decoder" in batch.name else "attention_mask")
    if padding is not None and padding.shape == output.shape[:2]:
        output = output * padding[..., None].to(output.dtype)
    return output, next(iter(caches.values()))
