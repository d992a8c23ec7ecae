"""Attention under sequence parallelism: exchange, any kernel, exchange back. Called by models as their attention."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sp_attention.distributed.collectives import gather
from sp_attention.distributed.peers import Peers
from sp_attention.errors import BackendError, UnsupportedError
from sp_attention.kernels import registry
from sp_attention.kernels.eager import eager_functions
from sp_attention.kernels.request import Backend, Mask, Request, reason_against
from sp_attention.region.context import Context, StackPass
from sp_attention.region.kv_cache import one_dtype
from sp_attention.region.masks import DOCUMENTS, Described
from sp_attention.region.sequence_dims import Along
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head, to_heads
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

# What models pass to an attention function besides the tensors, without meaning for the result: the mask has the
# window and the positions in it, and the region knows what is recorded.
_TOLD_BY_THE_MASK = {"sliding_window", "position_ids", "cache_position", *DOCUMENTS}
_ABOUT_OTHER_THINGS = {
    "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "labels",
    "num_items_in_batch", "shift_labels", "logits_to_keep",
}  # fmt: skip

Attended = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class UlyssesAttention:
    """The attention function that is registered with transformers for one enabled model.

    `current` tells which call is going on; the region sets it. `name_of` gives a module's full name, for errors.
    `cross_attention` are the modules whose keys are of another sequence than their queries (cross-attention).
    """

    backend: Backend
    peers: Peers
    current: Context
    name_of: Callable[[nn.Module | None], str]
    cross_attention: frozenset[nn.Module] = frozenset()

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
    ) -> Attended:
        """query [B, H, s | S, D], key, value [B, Hkv, s | S, D | Dv] → [B, s | S, H, Dv], weights [B, H, S, S] | None.

        transformers' calling convention for attention functions. `s_aux` [H] are sinks; `position_bias` [1|B, H, S, S]
        is added to the scores. Raises equally on every rank: BackendError for what the kernel does not do exactly, and
        UnsupportedError for arguments that nothing is known of.
        """
        self._refuse_unknown(module, options)
        call, kept = self.current.call, self.current.heads_kept(key)
        query, key, value = one_dtype(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        length = query.shape[1] if call is None else call.extent.length
        mine = length if call is None else call.mine.length
        # Keys that every rank holds whole: of another sequence, or out of latents that a cache keeps.
        cross_attention = call is not None and kept is None and (module in self.cross_attention or key.shape[1] != mine)
        memory = length if call is not None and kept is None and not cross_attention else key.shape[1]
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        given = attention_mask.mask if isinstance(attention_mask, Described) else attention_mask
        if given is None:
            if causal and length > 1 and memory != length:
                raise UnsupportedError(
                    f"{self.name_of(module)} says that it is causal, and gives no mask to {length} queries and "
                    f"{memory} keys: nothing tells where in the sequence these queries are"
                )
            given = Mask(query.shape[0], length, memory, query.device, causal=causal and length > 1)
        if call is not None:
            given, position_bias = call.original(given), call.original(position_bias)
        mask = as_mask(given, self.name_of(module), query.shape[0], length)
        if (mask.query_length, mask.key_length, query.shape[1]) != (length, memory, mine):
            raise UnsupportedError(
                f"{self.name_of(module)}: {query.shape[1]} queries attend to {key.shape[1]} keys, with a mask for "
                f"{mask.query_length} and {mask.key_length}, in a sequence of {length} tokens of which this rank has "
                f"{mine}; that is not what enable() saw in its rehearsal"
            )
        # From a single query, the last, it hides nothing.
        if mask.is_plainly_causal and not causal and length > 1:
            raise UnsupportedError(
                f"{self.name_of(module)} says that it is not causal, and is given a causal mask: transformers' kernels "
                "do not agree on what that is without padding. Give an attention_mask [B, 1, S, S] of your own."
            )
        bias = None if position_bias is None else _for_all(position_bias, length, memory, self.name_of(module))
        if mask.explicit is not None and mask.explicit.dtype != torch.bool:
            whole, additive = mask, mask.explicit
            # One for all layers, since kernels keep with it what they derive from it.
            mask = whole.once("without explicit", lambda: replace(whole, explicit=None))
            bias = additive if bias is None else additive + bias
        scale = scaling if scaling is not None else query.shape[3] ** -0.5
        sinks = None if s_aux is None else s_aux.reshape(-1)
        request = Request(query, key, value, mask, scale, softcap, sinks, bias, dropout, module)
        if call is not None and kept is not None:
            return self._attend_kept(request, call, kept)
        if call is None or not call.is_shared:
            self._require_done([request])
            return self._attend(request)
        if cross_attention:
            return self._attend_over_memory(request, call)
        return self._attend_shared(request, call)

    def _attend_kept(self, request: Request, call: StackPass, kv_heads: int) -> Attended:
        """All new queries of my heads over keys of my heads: a cache has exchanged those already, or cut them."""
        query, all_heads = request.query, request.query.shape[2]
        plan = head_plan(all_heads, kv_heads, self.peers.size)
        if request.key.shape[2] != len(plan.stored[self.peers.rank]):
            raise UnsupportedError(
                f"{self.name_of(request.module)}: {request.key.shape[2]} of {kv_heads} key heads come out of a cache, "
                f"where this rank keeps {len(plan.stored[self.peers.rank])} for its share of {all_heads} query heads"
            )
        self._require_done(_shares(request, plan))
        request = _of_rank(request, plan, self.peers.rank)
        if call.is_shared:
            (query,) = to_heads((query,), plan, ("query",), call.extent.length, self.peers)
        else:
            heads = plan.query[self.peers.rank]
            query = query[:, :, heads.start : heads.stop]
        out, weights = self._attend_mine(replace(request, query=query), plan)
        if call.is_shared:
            return head_to_seq(out, plan, self.peers), weights
        return gather(out, all_heads, self.peers, 2), weights

    def _attend_over_memory(self, request: Request, call: StackPass) -> Attended:
        """My span's queries see keys that every rank holds, of all heads: nothing is exchanged."""
        bias = request.bias
        if bias is not None and bias.shape[2] != 1:
            bias = bias[:, :, call.span.start : call.span.stop]
        request = replace(request, mask=request.mask.rows(call.span), bias=bias)
        self._require_done([request])
        out, weights = self._attend(request)
        return out, None if weights is None else call.whole(weights, Along(2))

    def _attend_shared(self, request: Request, call: StackPass) -> Attended:
        """All queries and keys of my heads: the exchange, the kernel, the exchange back."""
        plan = head_plan(request.query.shape[2], request.key.shape[2], self.peers.size)
        self._require_done(_shares(request, plan))
        request = _of_rank(request, plan, self.peers.rank)
        query, key, value = seq_to_head(request.query, request.key, request.value, call.extent.length, plan, self.peers)
        out, weights = self._attend_mine(replace(request, query=query, key=key, value=value), plan)
        return head_to_seq(out, plan, self.peers), weights

    def _attend_mine(self, request: Request, plan: HeadPlan) -> Attended:
        """The attention of my heads, which may be none: more ranks than heads. The weights are of all heads."""
        query, key, value = request.query, request.key, request.value
        weights: Tensor | None
        if not query.shape[2]:
            # Empty too, and it takes part in backward like that of the others.
            weights = query.transpose(1, 2) @ key[:, :, :0].permute(0, 2, 3, 1)
            out = (weights @ value[:, :, :0].transpose(1, 2)).transpose(1, 2)
        else:
            if not plan.grouped[self.peers.rank]:
                order = request.mask.once(("kv of query", plan), lambda: self._kv_of_query(plan, key.device))
                request = replace(request, key=key.index_select(2, order), value=value.index_select(2, order))
            out, weights = self._attend(request)
        if not self.current.weights or weights is None:
            return out, None
        return out, gather(weights, plan.query[-1].stop, self.peers, 1)

    def _kv_of_query(self, plan: HeadPlan, device: torch.device) -> Tensor:
        return torch.tensor(plan.kv_of_query(self.peers.rank), device=device)

    def _attend(self, request: Request) -> Attended:
        if not self.current.weights:
            return self.backend.attend(request), None
        assert self.backend.attend_with_weights is not None
        return self.backend.attend_with_weights(request)

    def _require_done(self, requests: list[Request]) -> None:
        """Raise BackendError unless the backend does every one of the requests exactly."""
        for request in requests:
            reason = self._why_not(self.backend, request)
            if reason is not None:
                device = request.query.device.type
                able = [
                    one.kernel
                    for one in registry.usable(device)
                    if not any(self._why_not(one, other) for other in requests)
                ]
                cure = f'Use enable(model, backend="{able[0]}"). ' if able else ""
                raise BackendError(
                    f"{self.name_of(request.module)}: kernel {self.backend.kernel!r} on {device} cannot do this: "
                    f"{reason}. {cure}Installed kernels that can: {', '.join(able) or 'none'}."
                )

    def _why_not(self, backend: Backend, request: Request) -> str | None:
        if self.current.weights and backend.attend_with_weights is None:
            return "it has no attention weights to return (output_attentions=True)"
        return reason_against(backend, request)

    def _refuse_unknown(self, module: nn.Module, options: dict[str, Any]) -> None:
        for name, value in options.items():
            # A flag that is off, or absent, asks for nothing.
            if name in _TOLD_BY_THE_MASK | _ABOUT_OTHER_THINGS or value is None or value is False:
                continue
            if id(value) in self.current.given and name not in _read_by_transformers(module):
                continue  # The user's own, passed down to no effect: transformers' attention does not look at it.
            raise UnsupportedError(
                f"{self.name_of(module)}: the attention argument {name!r} is not covered under sequence parallelism "
                "yet, and would be wrong if it were passed on uncut"
            )


def _read_by_transformers(module: nn.Module) -> frozenset[str]:
    """The arguments that transformers' own attention functions take by name in this module."""
    functions = [sdpa_attention_forward, *eager_functions(module)]
    return frozenset(name for function in functions for name in signature(function).parameters)


def _of_rank(request: Request, plan: HeadPlan, rank: int) -> Request:
    """The request with what is per head, or read from the module by head, cut to one rank's heads."""
    heads = plan.query[rank]
    bias = request.bias
    return replace(
        request,
        mask=request.mask.heads(heads),
        sinks=None if request.sinks is None else request.sinks[heads.start : heads.stop],
        bias=bias if bias is None or bias.shape[1] == 1 else bias[:, heads.start : heads.stop],
        heads=heads,
        all_heads=plan.query[-1].stop,
    )


def _for_all(bias: Tensor, length: int, memory: int, name: str) -> Tensor:
    if bias.dim() != 4 or bias.shape[2] not in (1, length) or bias.shape[3] != memory:
        raise UnsupportedError(
            f"{name}: a bias {list(bias.shape)} on the scores is not of {length} queries and {memory} keys"
        )
    return bias


def _shares(request: Request, plan: HeadPlan) -> list[Request]:
    """What any rank will ask of its kernel: shapes, dtypes and a dense last dim, without memory or values of their own.

    All ranks look at the requests of all, so that a kernel that refuses one of them is refused by every rank, before
    some wait for the others in the exchange.
    """
    queries, keys = request.mask.query_length, request.mask.key_length

    def shaped(like: Tensor, length: int, heads: int) -> Tensor:
        return like.new_empty(like.shape[3]).expand(like.shape[0], length, heads, -1)

    return [
        replace(
            _of_rank(request, plan, rank),
            query=shaped(request.query, queries, h),
            key=shaped(request.key, keys, n),
            value=shaped(request.value, keys, n),
        )
        for h, n, rank in plan.kinds
    ]


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
