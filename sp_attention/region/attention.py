"""The attention function that models call, in transformers' calling convention, under sequence parallelism."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sp_attention.distributed.peers import Peers
from sp_attention.errors import UnsupportedError
from sp_attention.kernels.eager import eager_functions
from sp_attention.kernels.request import Backend, Mask, Request
from sp_attention.region.context import Context, StackPass
from sp_attention.region.kv_cache import one_dtype
from sp_attention.region.masks import DOCUMENTS, Described
from sp_attention.ulysses import attention as ulysses
from sp_attention.ulysses.head_groups import HeadGroups, attend_in_groups, groups_for, in_groups, most_groups
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

# What models pass to an attention function besides the tensors, without meaning for the result: the mask has the
# window and the positions in it, and the region knows what is recorded.
_TOLD_BY_THE_MASK = {"sliding_window", "position_ids", "cache_position", *DOCUMENTS}
_ABOUT_OTHER_THINGS = {
    "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "labels",
    "num_items_in_batch", "shift_labels", "logits_to_keep",
}  # fmt: skip


# A compiled model runs it as it is: its backward computes it again.
_in_groups = torch.compiler.disable(attend_in_groups)


@dataclass(frozen=True)
class AttentionFunction:
    """The attention function that is registered with transformers for one enabled model.

    `context` tells what is going on; the region's hooks set it. `name_of` gives a module's full name, for errors.
    `cross_attention` are the modules whose keys are of another sequence than their queries. `head_groups`: how many
    groups of heads attend one after the other, None for all at once.
    """

    backend: Backend
    peers: Peers
    context: Context
    name_of: Callable[[nn.Module | None], str]
    cross_attention: frozenset[nn.Module] = frozenset()
    head_groups: HeadGroups | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Described | Mask | Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> ulysses.Output:
        """query [B, H, s | S, D], key, value [B, Hkv, s | S, D | Dv] → [B, s | S, H, Dv], weights [B, H, S, S] | None.

        transformers' calling convention for attention functions. `s_aux` [H] are sinks; `position_bias` [1|B, H, S, S]
        is added to the scores. Raises equally on every rank: BackendError for what the kernel does not do exactly, and
        UnsupportedError for arguments that nothing is known of.
        """
        if self.context.scope.attend is not None:
            return self.context.scope.attend(module, query, key, value), None
        name = self.name_of(module)
        self._refuse_unknown(module, options)
        call = self._read(module, query, key, value)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask, bias = self._mask_and_bias(call, attention_mask, position_bias, causal, name)
        request = Request(
            call.query,
            call.key,
            call.value,
            mask,
            scale=scaling if scaling is not None else query.shape[3] ** -0.5,
            softcap=softcap,
            sinks=None if s_aux is None else s_aux.reshape(-1),
            bias=bias,
            dropout=dropout,
            module=module,
        )
        return self._attend(request, call, name)

    def _read(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> "_Call":
        """What transformers passes, in our order of dims, and which of it is of my span or of my heads."""
        stack_pass, cached_heads = self.context.stack_pass, self.context.heads_kept(key)
        query, key, value = one_dtype(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        length = query.shape[1] if stack_pass is None else stack_pass.extent.length
        mine = length if stack_pass is None else stack_pass.mine.length
        own_keys = stack_pass is not None and cached_heads is None
        # Keys that every rank holds whole: of another sequence, or out of latents that a cache keeps.
        whole_keys = own_keys and (module in self.cross_attention or key.shape[1] != mine)
        key_length = length if own_keys and not whole_keys else key.shape[1]
        return _Call(query, key, value, length, mine, key_length, stack_pass, cached_heads, whole_keys)

    def _mask_and_bias(
        self,
        call: "_Call",
        given: Described | Mask | Tensor | None,
        position_bias: Tensor | None,
        causal: bool,
        name: str,
    ) -> tuple[Mask, Tensor | None]:
        """The mask as a description, and what is added to the scores, of the whole sequence: [1|B, 1|H, 1|S, Sk]."""
        length, key_length = call.length, call.key_length
        if isinstance(given, Described):
            given = given.mask
        elif given is None:
            given = _mask_where_none_is_given(call, causal, name)
        if call.stack_pass is not None:
            given, position_bias = call.stack_pass.original(given), call.stack_pass.original(position_bias)
        mask = as_mask(given, name, call.query.shape[0], length)
        if (mask.query_length, mask.key_length, call.query.shape[1]) != (length, key_length, call.mine):
            raise UnsupportedError(
                f"{name}: {call.query.shape[1]} queries attend to {call.key.shape[1]} keys, with a mask for "
                f"{mask.query_length} and {mask.key_length}, in a sequence of {length} tokens of which this rank has "
                f"{call.mine}; that is not what enable() saw in its rehearsal"
            )
        # From a single query, the last, it hides nothing.
        if mask.is_plainly_causal and not causal and length > 1:
            raise UnsupportedError(
                f"{name} says that it is not causal, and is given a causal mask: transformers' kernels "
                "do not agree on what that is without padding. Give an attention_mask [B, 1, S, S] of your own."
            )
        bias = None if position_bias is None else _for_all(position_bias, length, key_length, name)
        if mask.explicit is not None and mask.explicit.dtype != torch.bool:
            whole, additive = mask, mask.explicit
            # One for all layers, since kernels keep with it what they derive from it.
            mask = whole.once("without explicit", lambda: replace(whole, explicit=None))
            bias = additive if bias is None else additive + bias
        return mask, bias

    def _attend(self, request: Request, call: "_Call", name: str) -> ulysses.Output:
        """The Ulysses step that fits the keys, once the kernel is known to do all that any rank will ask of it."""
        kernel, peers = ulysses.Kernel(self.backend, self.context.scope.weights), self.peers
        stack_pass, heads = call.stack_pass, request.query.shape[2]
        if stack_pass is None or (call.cached_heads is None and not stack_pass.is_shared):
            ulysses.require_done([request], kernel, name)
            return kernel(request)
        if call.whole_keys:
            ulysses.require_done([ulysses.cut_to_queries(request, stack_pass.span)], kernel, name)
            return ulysses.attend_to_whole_keys(request, call.length, peers, kernel)
        if call.cached_heads is None:
            groups = self._head_groups(request, call.length)
            plans = [ulysses.plan_of(one, peers.size, kernel) for one in groups]
            for one, shared in zip(groups, plans, strict=True):
                if not kernel.with_weights:
                    self.context.plans[one.query.shape[2], one.key.shape[2]] = shared
                if isinstance(shared, HeadPlan):  # a grid is taken only where the kernel was asked, and does it
                    ulysses.require_done(ulysses.requests_of_all_ranks(one, shared), kernel, name)
            if len(groups) == 1:
                return ulysses.attend(request, call.length, plans[0], peers, kernel)
            return _in_groups(request, call.length, plans, peers, kernel), None
        plan = head_plan(heads, call.cached_heads, peers.size)
        if request.key.shape[2] != len(plan.stored[peers.rank]):
            raise UnsupportedError(
                f"{name}: {request.key.shape[2]} of {call.cached_heads} key heads come out of a cache, where this rank "
                f"keeps {len(plan.stored[peers.rank])} for its share of {heads} query heads"
            )
        ulysses.require_done(ulysses.requests_of_all_ranks(request, plan), kernel, name)
        length = call.length if stack_pass.is_shared else None
        return ulysses.attend_cached(request, length, plan, peers, kernel)

    def _head_groups(self, request: Request, length: int) -> list[Request]:
        """The request, or those of the groups of heads that attend one after the other; not if weights are wanted."""
        count, ranks = self.head_groups, self.peers.size
        if count == "auto":
            # The proof is of as many as there can be.
            rehearses = self.context.rehearses
            count = most_groups(request, ranks) if rehearses else groups_for(request, length, ranks)
        return [request] if count is None or self.context.scope.weights else in_groups(request, count)

    def _refuse_unknown(self, module: nn.Module, options: dict[str, Any]) -> None:
        for name, value in options.items():
            # A flag that is off, or absent, asks for nothing.
            if name in _TOLD_BY_THE_MASK | _ABOUT_OTHER_THINGS or value is None or value is False:
                continue
            scope = self.context.scope
            is_users = name in scope.ignored or (isinstance(value, Tensor) and value in scope.given)
            if is_users and name not in _read_by_transformers(module):
                continue  # The user's own, passed down to no effect: transformers' attention does not look at it.
            raise UnsupportedError(
                f"{self.name_of(module)}: the attention argument {name!r} is not covered under sequence parallelism "
                "yet, and would be wrong if it were passed on uncut"
            )


def names_in(model: nn.Module) -> Callable[[nn.Module | None], str]:
    """What tells the full name of a module of a model, or what it is where it has none, as in a copy of a model."""
    names = WeakKeyDictionary({module: name for name, module in model.named_modules()})

    def name_of(module: nn.Module | None) -> str:
        return type(module).__name__ if module is None else names.get(module, type(module).__name__)

    return name_of


@dataclass(frozen=True)
class _Call:
    """A call of the attention function.

    query [B, s | S, H, D], key and value [B, s | S | Sk, Hkv | hkv, D | Dv]. length, mine: S and the tokens that this
    rank has of it. key_length: Sk, of the mask. cached_heads: of how many heads the keys are those that this rank keeps
    in a cache, None where they are of all. whole_keys: every rank has all keys, and its span of the queries.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    length: int
    mine: int
    key_length: int
    stack_pass: StackPass | None
    cached_heads: int | None
    whole_keys: bool


def _mask_where_none_is_given(call: _Call, causal: bool, name: str) -> Mask:
    if causal and call.length > 1 and call.key_length != call.length:
        raise UnsupportedError(
            f"{name} says that it is causal, and gives no mask to {call.length} queries and {call.key_length} keys: "
            "nothing tells where in the sequence these queries are"
        )
    query = call.query
    return Mask(query.shape[0], call.length, call.key_length, query.device, causal=causal and call.length > 1)


def _read_by_transformers(module: nn.Module) -> frozenset[str]:
    """The arguments that transformers' own attention functions take by name in this module."""
    functions = [sdpa_attention_forward, *eager_functions(module)]
    return frozenset(name for function in functions for name in signature(function).parameters)


def _for_all(bias: Tensor, length: int, key_length: int, name: str) -> Tensor:
    if bias.dim() != 4 or bias.shape[2] not in (1, length) or bias.shape[3] != key_length:
        raise UnsupportedError(
            f"{name}: a bias {list(bias.shape)} on the scores is not of {length} queries and {key_length} keys"
        )
    return bias


def as_mask(mask: Mask | Tensor, name: str, batch: int, length: int) -> Mask:
    """The description of a mask that arrives at a layer: ours, or a tensor [1|B, 1|H, 1|Sq, Sk] that hides keys.

    Raises UnsupportedError for anything else; `name` is the module's, for the text.
    """
    if isinstance(mask, Mask):
        return mask
    if (
        isinstance(mask, Tensor)
        and (mask.dtype == torch.bool or mask.is_floating_point())
        and mask.dim() == 4
        and mask.shape[2] in (1, length)
    ):
        return Mask(batch, length, mask.shape[3], mask.device, causal=False, explicit=mask)
    kind = f"a tensor {mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise UnsupportedError(
        f"{name}: the attention mask is {kind}; masks that transformers' mask functions build are covered, and your "
        "own, bool or float, of shape [B, 1, S, S]"
    )
