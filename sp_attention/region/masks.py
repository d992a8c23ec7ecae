"""transformers' mask builders → our description of the mask; nothing of size S × S is built.

transformers calls the function registered under our key once per distinct mask and forward, and hands what it returns
to every layer unread.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    packed_sequence_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from sp_attention.errors import UnsupportedError
from sp_attention.kernels.request import Mask, MaskFunction
from sp_attention.region.versions import remap_positions

# Where packed documents begin, as `position_ids` say too: for what runs on whole sequences.
DOCUMENTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}

# transformers composes masks out of closures. A closure is recognised by its code object, which no other function
# has, and its numbers and tensors are then read from its cells. Anything else stays a function.
_SOME = torch.zeros(1, 1, dtype=torch.int64)
_CAUSAL: Any = causal_mask_function
_BIDIRECTIONAL: Any = bidirectional_mask_function
_AND = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__
_WINDOW_ON_BOTH_SIDES = sliding_window_bidirectional_overlay(1).__code__
_CHUNKS = chunked_overlay(1, _SOME[0]).__code__
_DOCUMENTS = packed_sequence_mask_function(_SOME).__code__
# Nothing that a function has where transformers does not remap.
_REMAPPED: Any = remap_positions(causal_mask_function, _SOME).__code__ if remap_positions else object()


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """What transformers' builder asks for, as a Mask. The arguments are those of transformers' `sdpa_mask`.

    With a filled cache the queries begin at `q_offset` of the sequence, and the keys, the first of which a sliding
    window may have dropped, at `kv_offset`. A static cache has the first as a tensor, which is read back to the host.
    """
    first = int(kv_offset)
    parts = _parts(mask_function, batch_size, range(first, first + kv_length))
    function = None
    if parts.functions:
        function = parts.functions[0] if len(parts.functions) == 1 else and_masks(*parts.functions)
        function = element_by_element(function) if use_vmap else function
        function = _shifted(function, first) if first else function
    padding = None
    if attention_mask is not None:
        # As transformers does: keys that the mask does not reach are not real, and what it has beyond them is not read.
        reached = attention_mask[:, first : first + kv_length].bool()
        padding = F.pad(reached, (0, kv_length - reached.shape[1]))
    return Mask(
        batch=batch_size,
        query_length=q_length,
        key_length=kv_length,
        device=torch.device(device),
        causal=parts.causal,
        window=parts.window if parts.window is not None and parts.window < kv_length else None,
        documents=parts.documents,
        padding=None if padding is None or bool(padding.all()) else padding,
        function=function,
        offset=int(q_offset) - first,
    )


def _shifted(function: MaskFunction, first: int) -> MaskFunction:
    """The function, asked about positions that are counted from `first`."""
    return lambda batch, head, query, key: function(batch, head, query + first, key + first)


class Described(BlockMask):
    """What layers are given in place of a mask.

    Not the mask itself, which is a dataclass: FSDP2 in mixed precision casts the tensors inside of those that a layer
    is given, and would hand each layer a copy, without what the mask keeps for all of them. A `BlockMask`, since that
    is what transformers hands on unread where generate() makes the masks before it calls the model.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.mask.batch, 1, self.mask.query_length, self.mask.key_length

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def contiguous(self) -> "Described":
        return self

    def to(self, device: torch.device | str | int, *_: Any, **__: Any) -> "Described":
        """accelerate's hooks move to a layer's device whatever can be moved."""
        there, here = torch.device(device), self.mask.device
        if there.type != here.type or None is not there.index != here.index is not None:
            raise UnsupportedError(
                f"layers of this model are on {there}, and its masks on {here}: a model that is spread over several "
                "devices of a rank is not covered, so put all of it on one"
            )
        return self

    def _refuse(self, *_: Any) -> Any:
        raise UnsupportedError(
            "a description of a mask, which enable() has put in its place, is used as if it were a tensor. If this is "
            "in backward: layers that are checkpointed run again in it, so it has to come before handle.disable(), and "
            "not within handle.suspended()"
        )

    __getitem__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls._refuse(cls)  # type: ignore[arg-type]  # which looks at none

    def __repr__(self) -> str:
        return f"Described{list(self.shape)}"

    __str__ = __repr__

    @property
    def told(self) -> dict[str, Any]:
        """What the mask is made of but for functions, by name: numbers and tensors."""
        names = ("causal", "window", "offset", "documents", "padding")
        return {"shape": str(self.shape)} | {name: getattr(self.mask, name) for name in names}


def describe_for_layers(*args: Any, **options: Any) -> Described:
    """`describe`, as it is registered with transformers."""
    return Described(describe(*args, **options))


@dataclass(frozen=True)
class _Condition:
    """One of the mask functions that must all hold; with `positions` [B, S] it is asked about those of the indices."""

    function: MaskFunction
    positions: Tensor | None

    @property
    def code(self) -> CodeType | None:
        return getattr(self.function, "__code__", None)

    def __getitem__(self, name: str) -> Any:
        """What the function has captured under a name."""
        assert self.code is not None
        cells = dict(zip(self.code.co_freevars, self.function.__closure__ or (), strict=True))
        return cells[name].cell_contents

    def whole(self) -> MaskFunction:
        if self.positions is None:
            return self.function
        remapped: MaskFunction = remap_positions(self.function, self.positions)
        return remapped


@dataclass(frozen=True)
class _Parts:
    """A mask function as fields of Mask; `functions` is what has no field."""

    causal: bool
    window: int | None
    documents: Tensor | None
    functions: tuple[MaskFunction, ...]


def _parts(function: MaskFunction, batch: int, keys: range) -> _Parts:
    """What a mask function says of these keys of the sequence."""
    # Numbers of tokens that change where a document or a chunk ends, and never come back to what they were.
    numbers: list[Tensor] = []
    others: list[_Condition] = []
    for condition in _conjuncts(function):
        found = _numbers(condition, batch, keys) if condition.positions is None else None
        if found is None:
            others.append(condition)
        else:
            numbers.append(found)
    documents = reduce(_both, numbers) if numbers else None
    placed, functions = [], []
    for condition in others:
        # Positions that rise by one a token inside every document have the order and the distances of the indices.
        if condition.positions is None or (documents is not None and _rise(condition.positions, documents)):
            placed.append(condition)
        else:
            functions.append(condition.whole())
    causal = any(condition.function == _CAUSAL for condition in placed)
    windows = []
    for condition in placed:
        window = _window(condition, causal)
        chunks = _numbers(condition, batch, keys)
        if window is not None:
            windows.append(window)
        elif chunks is not None and documents is not None:
            documents = _both(documents, chunks)
        elif condition.function not in (_CAUSAL, _BIDIRECTIONAL):
            functions.append(condition.whole())
    if documents is not None and not bool(documents.diff().any()):
        documents = None
    return _Parts(causal, min(windows, default=None), documents, tuple(functions))


def _conjuncts(function: MaskFunction, positions: Tensor | None = None) -> Iterator[_Condition]:
    condition = _Condition(function, positions)
    if condition.code is _AND:
        for part in condition["mask_functions"]:
            yield from _conjuncts(part, positions)
    elif condition.code is _REMAPPED and positions is None:
        yield from _conjuncts(condition["mask_function"], condition["position_ids"])
    else:
        yield condition


def _numbers(condition: _Condition, batch: int, keys: range) -> Tensor | None:
    """[B, Sk] numbers of documents or chunks, when the condition is that query and key have the same one."""
    if condition.code is _CHUNKS:
        padding: Tensor = condition["left_padding"]
        positions = condition.positions
        if positions is None:
            positions = torch.arange(keys.start, keys.stop, device=padding.device).expand(batch, len(keys))
        return (positions - padding[:, None]) // int(condition["chunk_size"])
    if condition.code is _DOCUMENTS and condition.positions is None:
        documents: Tensor = condition["packed_sequence_mask"]
        if documents.shape == (batch, len(keys)) and bool((documents.diff() >= 0).all()):
            return documents
    return None


def _both(documents: Tensor, chunks: Tensor) -> Tensor:
    """Numbers that change where either changes."""
    return F.pad(((documents.diff() != 0) | (chunks.diff() != 0)).cumsum(1), (1, 0))


def _rise(positions: Tensor, documents: Tensor) -> bool:
    return bool(((positions.diff() == 1) | (documents.diff() != 0)).all())


def _window(condition: _Condition, causal: bool) -> int | None:
    """The window of a condition on the distance between query and key, None for other conditions."""
    window = None
    if condition.code is _WINDOW and causal:
        window = condition["sliding_window"]
    elif condition.code is _WINDOW_ON_BOTH_SIDES:
        window = condition["sliding_window"] + 1
    return window if window is not None and window >= 1 else None


def element_by_element(function: MaskFunction) -> MaskFunction:
    """A function that is called with one index of each kind, as one that is called with index tensors that broadcast.

    transformers calls the mask functions of users so (`use_vmap`), and they need not be made for tensors.
    """

    def broadcast(*indices: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(*(index.shape for index in indices))
        aligned = [index.reshape((1,) * (len(shape) - index.dim()) + index.shape) for index in indices]
        mapped: Callable[..., Tensor] = function
        for dim in reversed(range(len(shape))):
            if shape[dim] != 1:
                mapped = torch.vmap(mapped, tuple(0 if index.shape[dim] != 1 else None for index in aligned))
        # As transformers does: inside, indexing a tensor with an index reads no number back.
        with TransformGetItemToIndex():
            result = mapped(*(index.reshape([size for size in index.shape if size != 1]) for index in aligned))
        return result.reshape(shape)

    return broadcast
