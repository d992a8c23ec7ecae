"""transformers' mask builders → our description of the mask; nothing of size S × S is built.

transformers calls the function registered under our key once per distinct mask and forward, and hands what it returns
to every layer unread.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_overlay,
)

from sp_attention.attention import Mask
from sp_attention.errors import UnsupportedError

# transformers composes masks out of closures. A closure is recognised by its code object, which no other function
# has, and its numbers and tensors are then read from its cells.
_SOME = torch.zeros(1, 1, dtype=torch.int64)
_AND = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__
_DOCUMENTS = packed_sequence_mask_function(_SOME).__code__
_REMAPPED = remap_positions_for_packed_sequence(causal_mask_function, _SOME).__code__


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """What transformers' builder asks for, as a Mask. The arguments are those of transformers' `sdpa_mask`.

    Raises UnsupportedError for queries that are not all of the sequence (a filled cache) and for mask functions other
    than causal, bidirectional, sliding window, packed documents and their combinations.
    """
    if isinstance(q_offset, Tensor) or q_offset or kv_offset or q_length != kv_length:
        raise UnsupportedError(
            f"attention of {q_length} queries over {kv_length} keys: a filled cache, or generation, is not covered "
            "under sequence parallelism yet. Call handle.disable() before, or pass use_cache=False and no cache."
        )
    parts = _parts(mask_function)
    window = parts.get("window")
    if window is not None and not parts.get("causal"):
        raise UnsupportedError("a sliding window over keys on both sides of a query is not covered yet")
    padding = None
    if attention_mask is not None:
        # As transformers does: keys that the mask does not reach are not real, and what it has beyond them is not read.
        reached = attention_mask[:, :kv_length].bool()
        padding = F.pad(reached, (0, kv_length - reached.shape[1]))
    return Mask(
        batch=batch_size,
        query_length=q_length,
        key_length=kv_length,
        device=torch.device(device),
        causal=parts.get("causal", False),
        window=window if window is not None and window < kv_length else None,
        documents=parts.get("documents"),
        padding=None if padding is None or bool(padding.all()) else padding,
    )


def _parts(function: Callable[..., Any]) -> dict[str, Any]:
    if function == causal_mask_function:
        return {"causal": True}
    if function == bidirectional_mask_function:
        return {}
    code = getattr(function, "__code__", None)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True)) if code is not None else {}
    if code is _WINDOW:
        return {"window": cells["sliding_window"].cell_contents}
    if code is _DOCUMENTS:
        return {"documents": cells["packed_sequence_mask"].cell_contents}
    if code is _REMAPPED:
        # Positions restart in every document. Inside one they rise by one a token, as the indices do, so causality
        # and distance are the same in both.
        parts = _parts(cells["mask_function"].cell_contents)
        if parts.keys() <= {"causal", "window"}:
            return parts
    if code is _AND:
        merged: dict[str, Any] = {}
        for part in map(_parts, cells["mask_functions"].cell_contents):
            if merged.keys() & part.keys() - {"causal"}:
                break
            merged |= part
        else:
            return merged
    raise UnsupportedError(
        f"the mask function {getattr(function, '__qualname__', function)!r} is not covered yet: causal, bidirectional, "
        "sliding-window and packed masks are, with padding, and a mask tensor [B, 1, S, S] of your own."
    )
