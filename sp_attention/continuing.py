"""Prove that a sharded model goes on from a key/value cache as the whole one does."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sp_attention.agreement import attempted
from sp_attention.attending import Own, attend_as, own_attention
from sp_attention.cache import told_of
from sp_attention.errors import BackendError, UnsupportedError
from sp_attention.plan import Stack
from sp_attention.recording import same
from sp_attention.region import TOKENS, Hooks
from sp_attention.specimens import Inputs, Specimen
from sp_attention.trees import tensors


def prove_caches(model: PreTrainedModel, hooks: Hooks, own: Own, specimen: Specimen) -> None:
    """Allow caches if the sharded model goes on from one as the model does that attends on its `own`, or note why not.

    The specimen is taken in steps: so many tokens that the ranks share them, one token, and again so many; or where the
    model itself does not go on with several tokens, all but one, and that. Some models do so without a mask only.
    """
    name = next((name for name in TOKENS if name in specimen.inputs), None)
    takes = signature(model.forward).parameters
    if name is None or takes.keys().isdisjoint({"use_cache", "past_key_values"}):
        hooks.region = replace(hooks.region, no_caches=None, caches=f"are none: {type(model).__name__} takes none")
        return
    size, length = hooks.peers.size, specimen.inputs[name].shape[1]
    ours = own_attention(model)
    # Put back after the rehearsal. Forwards with a cache compare the ranks' generators, which need not be alike yet.
    torch.manual_seed(0)
    unmasked = {one: value for one, value in specimen.inputs.items() if not one.endswith("attention_mask")}
    for stops, inputs in product(((size, size + 1, length), (length - 1, length)), (specimen.inputs, unmasked)):
        step = partial(_in_steps, model, inputs, name, stops)
        hooks.remove()
        attend_as(own)
        reason, expected = attempted(step, hooks.peers)
        attend_as(ours)
        if expected is None:
            refused = f"{type(model).__name__} does not go on from a cache: {reason}"
            continue

        def compare(step: Callable[[], Any] = step, expected: Any = expected) -> str:
            output, cache = step()
            if not same(output, expected[0]):
                raise UnsupportedError(f"{type(model).__name__} sharded gives other numbers with a filled cache")
            return told_of(cache)

        for kept in (hooks.region.stacks, tuple(map(_keeping_all_heads, hooks.region.stacks))):
            hooks.region = replace(hooks.region, no_caches=None)
            hooks.hook_instead(kept)
            try:
                reason, told = attempted(compare, hooks.peers, model.device)
            except BackendError as error:
                reason, told = str(error), None
            hooks.region = replace(hooks.region, no_caches=reason, caches=told or "")
            if reason is None:
                return
        return
    hooks.install()
    hooks.region = replace(hooks.region, no_caches=refused)


def _keeping_all_heads(stack: Stack) -> Stack:
    """The stack with caches that are whole on every rank, for models that work on keys and values that are cached."""
    layers = (replace(layer, heads=dict.fromkeys(layer.heads, 0)) for layer in stack.layers)
    return replace(stack, layers=tuple(layers))


def _in_steps(
    model: PreTrainedModel, whole: Mapping[str, Any], name: str, stops: tuple[int, ...]
) -> tuple[Tensor, Cache]:
    """What a model gives for the real tokens of a batch, some at a time, and the cache that it goes on from."""
    along = [name, name.replace("input_ids", "attention_mask")]
    outputs: list[Tensor] = []
    caches: Inputs = {}
    for start, stop in pairwise((0, *stops)):
        inputs: Inputs = {**whole, "use_cache": True} | caches
        inputs |= {one: inputs[one][:, (start if one == name else 0) : stop] for one in along if one in inputs}
        output = model(**inputs)
        caches = {one: value for one, value in output.items() if isinstance(value, Cache)}
        if not caches:
            raise UnsupportedError("it returns no cache of transformers' kind")
        outputs.append(next(tensor for path, tensor in tensors(output) if path[0] in ("logits", "last_hidden_state")))
    output = torch.cat(outputs, 1)
    padding = whole.get(along[1])
    if padding is not None and padding.shape == output.shape[:2]:
        output = output * padding[..., None].to(output.dtype)
    return output, next(iter(caches.values()))
