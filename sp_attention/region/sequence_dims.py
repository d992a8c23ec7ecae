"""Where the tokens of a tensor are: found by comparing two forwards of different batch and length."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sp_attention.region.pytree import Path, tensors


@dataclass(frozen=True)
class Extent:
    """The size of a batch of sequences: B rows of S tokens."""

    batch: int
    length: int


@dataclass(frozen=True)
class Along:
    """The dim of a tensor that is S; with `rows` it is dim 0 and B·S long, the rows of the batch behind each other."""

    dim: int
    rows: bool = False

    def size(self, extent: Extent) -> int:
        return extent.batch * extent.length if self.rows else extent.length

    def cut(self, tensor: Tensor, start: int, stop: int, extent: Extent) -> Tensor:
        """The tokens [start, stop) of each row, contiguous."""
        if self.rows:
            rows: Tensor = tensor.unflatten(0, (extent.batch, extent.length))
            return rows[:, start:stop].flatten(0, 1)
        return tensor.narrow(self.dim, start, stop - start).contiguous()


Dims = Mapping[Path, Along | None]


def along(tensor: Tensor, other: Tensor | None, here: Extent, there: Extent) -> Along | None:
    """The dim that follows the tokens, None if none does or several do; `other` is the same tensor of another batch."""
    if other is None or tensor.dim() != other.dim():
        return None
    pairs = list(zip(tensor.shape, other.shape, strict=True))
    found = [dim for dim, pair in enumerate(pairs) if pair == (here.length, there.length)]
    if len(found) == 1:
        return Along(found[0])
    if not found and pairs and pairs[0] == (here.batch * here.length, there.batch * there.length):
        return Along(0, rows=True)
    return None


def dims(tree: Any, other: Any, here: Extent, there: Extent) -> dict[Path, Along | None]:
    """`along` of every tensor of a tree, by path."""
    others = dict(tensors(other))
    return {path: along(tensor, others.get(path), here, there) for path, tensor in tensors(tree)}


def merged(several: list[dict[Path, Along | None]]) -> dict[Path, Along | None] | None:
    """What several calls of one module tell of its tensors together; None when they contradict each other."""
    result: dict[Path, Along | None] = {}
    for one in several:
        for path, found in one.items():
            if result.setdefault(path, found) != found:
                return None
    return result
