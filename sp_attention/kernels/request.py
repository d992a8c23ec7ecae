"""What a kernel is asked: one attention over a whole sequence for some heads, and a description of its mask.

The contract of a kernel: exactly this attention, or a reason not to do it. It never sees a process group.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Derived = TypeVar("Derived")


# transformers' signature of mask functions: int64 indices (batch, head, query, key) that broadcast → bool.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Mask:
    """Which key each query may see: every given condition must hold.

    Query i stands at position `offset + i` of the sequence that keys, documents and functions count in.

    causal: a query sees itself and what is before it.
    window: a query sees keys nearer than this: |query - key| < window. So with `causal` it is the number of keys that a
        query may see, itself included, and without `causal` that number is 2 * window - 1.
    documents: [B, Sk] integers that never decrease along a row; a query sees its own document only. Chunks are such.
    padding: [B, Sk] bool, True for real keys.
    function: any other condition; it is given what `allows` is given, and must work on index tensors that broadcast.
        The head index is always 0, as in transformers' own mask tensors.
    explicit: [1|B, 1|H, 1|Sq, Sk] bool, True = attend. A float tensor is one that the user gave to the model; it is
        added to the scores, and reaches kernels as `Request.bias`.
    offset: the position of the first query; not 0 for queries that are a later part of the sequence.
    """

    batch: int
    query_length: int
    key_length: int
    device: torch.device
    causal: bool = True
    window: int | None = None
    documents: Tensor | None = None
    padding: Tensor | None = None
    explicit: Tensor | None = None
    function: MaskFunction | None = None
    offset: int = 0
    _derived: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window counts the query itself, so it is 1 at least, not {self.window}")

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether key position `key` may be seen by query position `query`: int64 indices that broadcast → bool.

        The signature of transformers' mask functions. The result broadcasts to the indices' common shape. It has every
        condition but `explicit`, which knows places in a tensor and no positions.
        """
        result = torch.ones((), dtype=torch.bool, device=self.device)
        if self.causal:
            result = result & (key <= query)
        if self.window is not None:
            result = result & (key > query - self.window)
        if self.window is not None and not self.causal:
            result = result & (key < query + self.window)
        if self.documents is not None:
            result = result & (self.documents[batch, query] == self.documents[batch, key])
        if self.padding is not None:
            result = result & self.padding[batch, key]
        if self.function is not None:
            result = result & self.function(batch, head, query, key).to(result.device)
        return result

    def dense(self, queries: range | None = None) -> Tensor:
        """The mask as a bool tensor [1|B, 1|H, Sq, Sk], True = attend. Quadratic in memory; built once per mask.

        With `queries`, only the rows of those, counted from this mask's first query; such a part is not kept.
        """
        if queries is None:
            return self.once("dense", lambda: self.dense(range(0, self.query_length)))
        by_row = self.documents is not None or self.padding is not None or self.function is not None
        batch = torch.arange(self.batch if by_row else 1, device=self.device)[:, None, None, None]
        query = torch.arange(queries.start, queries.stop, device=self.device)[:, None] + self.offset
        key = torch.arange(self.key_length, device=self.device)
        result = self.allows(batch, torch.zeros_like(batch), query[None, None], key[None, None, None])
        result = result.expand(batch.shape[0], 1, len(queries), self.key_length)
        if self.explicit is None:
            return result
        if self.explicit.dtype != torch.bool:
            raise ValueError("an additive mask has no bool form; see Request.bias")
        return result & _cut(self.explicit, 2, queries)

    @property
    def is_plainly_causal(self) -> bool:
        """Causal and nothing else: the mask that kernels have a flag for."""
        others = (self.window, self.documents, self.padding, self.explicit, self.function)
        return self.causal and all(other is None for other in others)

    def rows(self, span: range) -> "Mask":
        """The mask of the queries [start, stop) only, which stay where they are in the sequence; built once per mask.

        Nothing is built from it: an explicit tensor is viewed, all else is shared.
        """

        def derive() -> "Mask":
            explicit = None if self.explicit is None else _cut(self.explicit, 2, span)
            return replace(self, query_length=len(span), offset=self.offset + span.start, explicit=explicit)

        return self if span == range(0, self.query_length) else self.once(("rows", span), derive)

    def heads(self, span: range) -> "Mask":
        """The mask of the query heads [start, stop) only: itself, unless an explicit tensor differs by head."""
        explicit = self.explicit
        if explicit is None or explicit.shape[1] == 1 or span == range(0, explicit.shape[1]):
            return self
        return self.once(("heads", span), lambda: replace(self, explicit=_cut(explicit, 1, span)))

    def once(self, name: object, derive: Callable[[], Derived]) -> Derived:
        """What a kernel derives from the mask, under a name of its choice: computed once, then kept with the mask.

        A model builds its masks once per forward, so this is how a kernel avoids repeating work in every layer.
        """
        if name not in self._derived:
            self._derived[name] = derive()
        result: Derived = self._derived[name]
        return result


def _cut(tensor: Tensor, dim: int, span: range) -> Tensor:
    """The view [start, stop) of a dim, or the tensor itself where that dim is 1 and stands for all."""
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, span.start, len(span))


@dataclass(frozen=True, eq=False)
class Request:
    """One attention for a kernel: whole sequence, some heads.

    query: [B, Sq, h, D], key: [B, Sk, hkv, D], value: [B, Sk, hkv, Dv]; strided views, last dim dense, one float
        dtype; h is a multiple of hkv and query head i uses KV head i // (h // hkv).
    scale: factor on the scores. softcap: scores become softcap * tanh(scores / softcap), before bias and mask.
    sinks: [h], a score per head that takes part in the softmax and has no value.
    bias: [1|B, 1|h, 1|Sq, Sk] float, added to the scaled scores. dropout: probability, on the attention weights.
    module: the model's attention module, for kernels that are transformers' own functions; its parameters, and what
        it knows of heads, are of all heads.
    heads, all_heads: which of the module's heads the queries are, and how many it has; None where they are all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    module: nn.Module | None = None
    heads: range | None = None
    all_heads: int | None = None


def _refuses_nothing(request: Request) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A kernel on a device, offered by a plugin.

    device: a torch device type ("cpu", "cuda", "npu", …), or "any".
    kernel: the name that `enable(model, backend=...)` knows it by.
    attend: the kernel: a request → [B, Sq, h, Dv]. It must not keep or change what it gets. A query that may see no
        key yields zeros, or see `own_where_blind`.
    attend_with_weights: as `attend`, and the attention weights [B, h, Sq, Sk] beside its output; None for a kernel that
        never holds them.
    priority: `backend="auto"` takes the highest among the available kernels of a device.
    unavailable: None, or the reason why this kernel cannot be used here, with the cure.
    refuses: None for a request that `attend` does exactly, or the reason why it will not. Called in every layer
        before anything is sent, on every rank with the shapes of all ranks: tensor values must not be read.
    own_where_blind: queries that may see no key yield what they do in the library whose function this is.
    """

    device: str
    kernel: str
    attend: Callable[[Request], Tensor]
    priority: int = 0
    unavailable: str | None = None
    refuses: Callable[[Request], str | None] = _refuses_nothing
    attend_with_weights: Callable[[Request], tuple[Tensor, Tensor]] | None = None
    own_where_blind: bool = False


def reason_against(backend: Backend, request: Request) -> str | None:
    """What `backend.refuses` says. A plugin's fault in it is a reason too: whoever asks goes on with other kernels."""
    try:
        reason = backend.refuses(request)
    except Exception as error:
        return f"asking it raised {type(error).__name__}: {error}"
    if reason is None or isinstance(reason, str):
        return reason
    return f"asked, it said {reason!r}, which is neither None nor a reason"
