"""Tensors of a few tokens, from which those of many tokens are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sp_attention.region.pytree import Path, map_leaves, tensors
from sp_attention.region.sequence_dims import Extent, along


@dataclass(frozen=True)
class FewTokens:
    """A tree of tensors of a few tokens.

    lengths: by path, the dims of the sequence, `extent.length` long: two in masks of queries and keys.
    rows: the paths of those that are B·S long, the rows of the batch one after another.
    """

    tree: Any
    extent: Extent
    lengths: Mapping[Path, tuple[int, ...]]
    rows: frozenset[Path]

    @staticmethod
    def of(tree: Any, other: Any, here: Extent, there: Extent) -> "FewTokens":
        """`other` is the same tree of another batch, by which the sequence is found."""
        others = dict(tensors(other))
        pairs = {path: (tensor, others[path]) for path, tensor in tensors(tree) if path in others}
        found = {path: along(*pair, here, there) for path, pair in pairs.items()}
        rows = frozenset(path for path, one in found.items() if one is not None and one.rows)
        sizes = {path: zip(one.shape, two.shape, strict=False) for path, (one, two) in pairs.items()}
        lengths = {
            path: tuple(dim for dim, pair in enumerate(both) if pair == (here.length, there.length))
            for path, both in sizes.items()
        }
        return FewTokens(tree, here, lengths, rows)

    def many(self, length: int, own: torch.dtype, dtype: torch.dtype) -> Any:
        """The tree for `length` tokens: most of them the last of the few, to crowd them where they compete.

        What is of the dtype `own` becomes `dtype`. There are no caches.
        """
        places = torch.arange(length) % self.extent.length
        places[torch.arange(length) % 4 > 0] = self.extent.length - 1

        def grow(path: Path, leaf: Any) -> Any:
            if isinstance(leaf, Cache):
                return None
            if not isinstance(leaf, Tensor):
                return leaf
            leaf, here = leaf.to(dtype) if leaf.dtype == own else leaf, places.to(leaf.device)
            if path in self.rows:
                rows = leaf.unflatten(0, (self.extent.batch, self.extent.length))
                return _uneven(rows[:, here], 1).flatten(0, 1)
            *queries, last = self.lengths.get(path, ()) or (None,)
            if last is not None:
                leaf = _uneven(leaf.index_select(last, here), last)
            for dim in queries:  # Without memory for length x length numbers, which only attention looks at.
                sizes = [-1] * leaf.dim()
                sizes[dim] = length
                leaf = leaf.narrow(dim, self.extent.length - 1, 1).expand(sizes)
            return leaf

        return map_leaves(grow, self.tree)

    def later(self, many: Any, length: int, start: int) -> Any:
        """The tokens from `start` on of the tree for `length` tokens; masks of queries and keys stay whole."""

        def cut(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if path in self.rows:
                return leaf.unflatten(0, (self.extent.batch, length))[:, start:].flatten(0, 1)
            dims = self.lengths.get(path, ())
            return leaf.narrow(dims[0], start, length - start).contiguous() if len(dims) == 1 else leaf

        return map_leaves(cut, many)


def _uneven(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with each entry along a dim a little larger or smaller, if it holds floats."""
    if not tensor.is_floating_point():
        return tensor
    shape = [1] * tensor.dim()
    shape[dim] = -1
    places = torch.arange(tensor.shape[dim], device=tensor.device, dtype=torch.float32)
    return tensor * (1 + 0.02 * (2.3 * places).sin()).to(tensor.dtype).view(shape)
