"""One pass of one batch through a stack of layers: its length, my span, and what was cut out of what."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from sp_attention.distributed.collectives import gather
from sp_attention.distributed.peers import Peers
from sp_attention.region.sequence_dims import Along, Extent
from sp_attention.region.sharded_embedding import Looked


@dataclass(eq=False)
class StackPass:
    """A batch on its way through a stack.

    extent: B and S of the whole batch, of its new tokens where a cache holds others. fills: its layers fill a cache.
    is_separate: each layer cuts its arguments and gathers its results. is_replicated: every rank does all of it, but
    for heads that it keeps. stays_sharded: nothing is gathered after the last layer.
    pieces: how many parts of its layers are given their tokens in.
    seed: of the random numbers that are drawn in it. embedded: my span of what its first layer is given, if that is all
    that was looked up.
    """

    extent: Extent
    peers: Peers
    fills: bool = False
    is_separate: bool = False
    is_replicated: bool = False
    stays_sharded: bool = False
    pieces: int = 1
    seed: int | None = None
    embedded: Looked | None = None
    _parts: dict[tuple[int, Along], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _wholes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def span(self) -> range:
        return self.peers.span(self.extent.length) if self.is_shared else range(0, self.extent.length)

    @property
    def mine(self) -> Extent:
        """B and s: the size of my part."""
        return Extent(self.extent.batch, len(self.span))

    @property
    def is_shared(self) -> bool:
        """A sequence shorter than the ranks are many is not cut: every rank does all of it."""
        return self.extent.length >= self.peers.size and not self.is_replicated

    def is_part(self, tensor: Tensor, along: Along) -> bool:
        return tensor.shape[along.dim] == along.size(self.mine)

    def is_whole(self, tensor: Tensor, along: Along) -> bool:
        return tensor.shape[along.dim] == along.size(self.extent)

    def part(self, whole: Tensor, along: Along, remember: bool = False) -> Tensor:
        """My span of a whole tensor. With `remember`, what every layer is given, such as rotary tables, is cut once."""

        def cut() -> Tensor:
            return along.cut(whole, self.span.start, self.span.stop, self.extent)

        return self._remembered(whole, along, cut) if remember else cut()

    def until_mine(self, whole: Tensor, along: Along) -> Tensor:
        """What ends with my span of a tensor that is of the tokens in a cache too."""
        others = self.extent.length - self.span.stop
        return self._remembered(whole, along, lambda: whole.narrow(along.dim, 0, whole.shape[along.dim] - others))

    def _remembered(self, whole: Tensor, along: Along, cut: Callable[[], Tensor]) -> Tensor:
        if whole.requires_grad:
            return cut()
        key = (id(whole), along)
        if key not in self._parts:
            part = cut()
            self._parts[key] = (whole, part)
            self._wholes[id(part)] = (whole, part)
        return self._parts[key][1]

    def whole(self, part: Tensor, along: Along) -> Tensor:
        """The whole tensor of which I have my span: the one it was cut from, or gathered from all ranks."""
        if id(part) in self._wholes:
            return self._wholes[id(part)][0]
        if not self.is_shared:
            return part
        if not along.rows:
            return gather(part, self.extent.length, self.peers, along.dim)
        rows: Tensor = part.unflatten(0, (self.mine.batch, self.mine.length))
        return gather(rows, self.extent.length, self.peers, 1).flatten(0, 1)

    def original(self, value: Any) -> Any:
        """The whole tensor that a remembered part was cut from; anything else as it is."""
        return self._wholes[id(value)][0] if id(value) in self._wholes else value


@dataclass(eq=False)
class Context:
    """What the running code belongs to.

    call: None outside of the stacks and in what is given whole tensors. weights: the user wants attention weights.
    given: the ids of the tensors that the models around the stacks were given. is_known: False outside of forwards, and
    of those recomputations in backward that are tied to theirs; then nothing tells what runs.
    kept: by id, the keys that caches gave out, of the heads that this rank keeps of so many.
    pieces: how many parts of layers are given their tokens in.
    """

    call: StackPass | None = None
    weights: bool = False
    given: frozenset[int] = frozenset()
    is_known: bool = False
    kept: dict[int, tuple[ReferenceType[Tensor], int]] = field(default_factory=dict)
    pieces: int = 1

    def keep(self, keys: Tensor, heads: int) -> None:
        """Note that keys are of the heads that this rank keeps in a cache, of `heads` in all."""
        self.kept[id(keys)] = (ref(keys), heads)

    def heads_kept(self, keys: Tensor) -> int | None:
        """Of how many heads these are the keys of those that this rank keeps; None for keys of all heads."""
        noted, heads = self.kept.get(id(keys), (None, None))
        return heads if noted is not None and noted() is keys else None

    @contextmanager
    def set_to(self, other: "Context") -> Iterator[None]:
        before = vars(self).copy()
        vars(self).update(vars(other))
        try:
            yield
        finally:
            vars(self).update(before)
