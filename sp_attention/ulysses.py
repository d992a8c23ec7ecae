"""Attention under sequence parallelism: exchange, any kernel, exchange back. Called by models as their attention.

Whether a call is inside the region is seen from its shapes alone: the mask knows the whole length S, and queries of my
span's length are shorter than that. So there is no state to go stale when a layer is recomputed in backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sp_attention import registry
from sp_attention.attention import Backend, Mask, Request
from sp_attention.errors import UnsupportedError
from sp_attention.exchange import Peers, head_to_seq, seq_to_head
from sp_attention.layout import HeadPlan, head_plan

# What models pass to an attention function besides the tensors, without meaning for the result: the mask has the
# window, the causal flag and the positions in it.
_TOLD_BY_THE_MASK = {"is_causal", "sliding_window", "position_ids", "cache_position"}
_ABOUT_OTHER_THINGS = {"use_cache", "output_hidden_states", "return_dict", "num_items_in_batch", "shift_labels"}


@dataclass(frozen=True)
class UlyssesAttention:
    """The attention function that is registered with transformers for one enabled model.

    `name_of` gives a module's full name, for errors.
    """

    backend: Backend
    peers: Peers
    name_of: Callable[[nn.Module | None], str]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask | Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """query [B, H, s | S, D], key and value [B, Hkv, s | S, D | Dv] → ([B, s | S, H, Dv], None).

        transformers' calling convention for attention functions. Raises UnsupportedError, equally on every rank, for
        what the backend does not do exactly and for arguments that nothing is known of.
        """
        self._refuse_unknown(module, options)
        query, key, value = _one_dtype(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        mask, bias = as_mask(attention_mask, self.name_of(module)), None
        if mask.explicit is not None and mask.explicit.dtype != torch.bool:
            mask, bias = replace(mask, explicit=None), mask.explicit
        scale = scaling if scaling is not None else query.shape[3] ** -0.5
        request = Request(query, key, value, mask, scale, softcap, bias=bias, dropout=dropout, module=module)
        length, mine = mask.query_length, len(self.peers.span(mask.query_length))
        if query.shape[1] not in (length, mine) or key.shape[1] != query.shape[1]:
            raise UnsupportedError(
                f"{self.name_of(module)}: {query.shape[1]} queries attend to {key.shape[1]} keys in a sequence of "
                f"{length} tokens, {mine} of them on this rank; cross-attention and filled caches are not covered yet"
            )
        if query.shape[1] == length:
            self._require_done([request])
            return self.backend.attend(request), None
        if dropout:
            raise UnsupportedError(f"{self.name_of(module)}: attention dropout is not covered yet: set it to 0")
        plan = head_plan(query.shape[2], key.shape[2], self.peers.size)
        self._require_done(_shares(request, plan))
        query, key, value = seq_to_head(query, key, value, length, plan, self.peers)
        if not query.shape[2]:
            # More ranks than heads and none of them here: `value` is empty too, and leads backward to the exchange.
            return head_to_seq(value, plan, self.peers), None
        if not plan.is_grouped(self.peers.rank):
            order = torch.tensor(plan.kv_of_query(self.peers.rank), device=key.device)
            key, value = key.index_select(2, order), value.index_select(2, order)
        out = self.backend.attend(replace(request, query=query, key=key, value=value))
        return head_to_seq(out, plan, self.peers), None

    def _require_done(self, requests: list[Request]) -> None:
        """Raise UnsupportedError unless the backend does every one of the requests exactly."""
        for request in requests:
            reason = self.backend.refuses(request)
            if reason is not None:
                device = request.query.device.type
                able = [b.kernel for b in registry.usable(device) if not any(map(b.refuses, requests))]
                cure = f'Use enable(model, backend="{able[0]}"). ' if able else ""
                raise UnsupportedError(
                    f"{self.name_of(request.module)}: kernel {self.backend.kernel!r} on {device} cannot do this: "
                    f"{reason}. {cure}Installed kernels that can: {', '.join(able) or 'none'}."
                )

    def _refuse_unknown(self, module: nn.Module, options: dict[str, Any]) -> None:
        for name, value in options.items():
            # A flag that is off, or absent, asks for nothing.
            if name in _TOLD_BY_THE_MASK | _ABOUT_OTHER_THINGS or value is None or value is False:
                continue
            raise UnsupportedError(
                f"{self.name_of(module)}: the attention argument {name!r} is not covered under sequence parallelism "
                "yet, and would be wrong if it were passed on uncut"
            )


def _shares(request: Request, plan: HeadPlan) -> list[Request]:
    """What any rank will ask of its kernel: shapes, dtypes and a dense last dim, without memory or values of their own.

    All ranks look at the requests of all, so that a kernel that refuses one of them is refused by every rank, before
    some wait for the others in the exchange.
    """
    length = request.mask.query_length

    def shaped(like: Tensor, heads: int) -> Tensor:
        return like.new_empty(like.shape[3]).expand(like.shape[0], length, heads, -1)

    shares = dict.fromkeys(
        (len(query), len(kv) if plan.is_grouped(rank) else len(query))
        for rank, (query, kv) in enumerate(zip(plan.query, plan.kv, strict=True))
        if len(query)
    )
    return [
        replace(request, query=shaped(request.query, h), key=shaped(request.key, n), value=shaped(request.value, n))
        for h, n in shares
    ]


def as_mask(mask: object, name: str) -> Mask:
    """The description of a mask that arrives at a layer: ours, or a tensor [1|B, 1, S, S] that the user gave.

    Raises UnsupportedError for anything else; `name` is the module's, for the text.
    """
    if isinstance(mask, Mask):
        return mask
    if (
        isinstance(mask, Tensor)
        and (mask.dtype == torch.bool or mask.is_floating_point())
        and mask.dim() == 4
        and mask.shape[1] == 1
    ):
        return Mask(mask.shape[0], mask.shape[2], mask.shape[3], mask.device, causal=False, explicit=mask)
    kind = f"a tensor {mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise UnsupportedError(
        f"{name}: the attention mask is {kind}; masks that transformers' mask functions build are covered, and your "
        "own, bool or float, of shape [B, 1, S, S]"
    )


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast the rotary embedding leaves q and k wider than v; kernels would cast them, so we do it first."""
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    if not torch.is_autocast_enabled(query.device.type):
        raise UnsupportedError(f"query, key and value have different dtypes: {query.dtype}, {key.dtype}, {value.dtype}")
    narrow = torch.get_autocast_dtype(query.device.type)
    return query.to(narrow), key.to(narrow), value.to(narrow)
