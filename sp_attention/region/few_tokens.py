"""Tensors of a few tokens, from which those of many tokens are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sp_attention.region.pytree import Path, map_leaves, tensors
from sp_attention.region.sequence_dims import Extent, dims


@dataclass(frozen=True)
class FewTokens:
    """A tree of tensors of a few tokens, of one row of the batch.

    length: how many tokens. lengths: by path, the dims of the sequence: two in masks of queries and keys.
    """

    tree: Any
    length: int
    lengths: Mapping[Path, tuple[int, ...]]

    @staticmethod
    def of(tree: Any, other: Any, here: Extent, there: Extent) -> "FewTokens":
        """The first row of a tree. `other` is the same tree of another batch, by which rows and tokens are found."""
        others = dict(tensors(other))
        sizes = {
            path: [*zip(one.shape, others[path].shape, strict=False)] for path, one in tensors(tree) if path in others
        }
        # Those that have the rows of the batch one after another, B·S long.
        flat = {path for path, found in dims(tree, other, here, there).items() if found is not None and found.rows}
        lengths = {
            path: tuple(dim for dim, pair in enumerate(pairs) if pair == (here.length, there.length))
            for path, pairs in sizes.items()
        } | dict.fromkeys(flat, (0,))

        def first_row(path: Path, leaf: Any) -> Any:
            if path in flat:
                return leaf[: here.length]
            for dim, (one, two) in enumerate(sizes.get(path, ())):
                # As long as the batch, or a multiple of it, such as B·H.
                if dim not in lengths[path] and one != two and one * there.batch == two * here.batch:
                    leaf = leaf.narrow(dim, 0, one // here.batch)
            return leaf

        return FewTokens(map_leaves(first_row, tree), here.length, lengths)

    def many(self, length: int, own: torch.dtype, dtype: torch.dtype) -> Any:
        """The tree for `length` tokens: most of them the last of the few, to crowd them where they compete.

        What is of the dtype `own` becomes `dtype`. There are no caches.
        """
        places = torch.arange(length) % self.length
        places[torch.arange(length) % 4 > 0] = self.length - 1

        def grow(path: Path, leaf: Any) -> Any:
            if isinstance(leaf, Cache):
                return None
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.to(dtype) if leaf.dtype == own else leaf
            *queries, last = self.lengths.get(path, ()) or (None,)
            if last is not None:
                leaf = _uneven(leaf.index_select(last, places.to(leaf.device)), last)
            for dim in queries:  # Without memory for length x length numbers, which only attention looks at.
                sizes = [-1] * leaf.dim()
                sizes[dim] = length
                leaf = leaf.narrow(dim, self.length - 1, 1).expand(sizes)
            return leaf

        return map_leaves(grow, self.tree)

    def later(self, many: Any, length: int, start: int) -> Any:
        """The tokens from `start` on of the tree for `length` tokens; masks of queries and keys stay whole."""

        def cut(path: Path, leaf: Any) -> Any:
            places = self.lengths.get(path, ())
            if not isinstance(leaf, Tensor) or len(places) != 1:
                return leaf
            return leaf.narrow(places[0], start, length - start).contiguous()

        return map_leaves(cut, many)


def _uneven(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with each entry along a dim a little larger or smaller, if it holds floats."""
    if not tensor.is_floating_point():
        return tensor
    shape = [1] * tensor.dim()
    shape[dim] = -1
    places = torch.arange(tensor.shape[dim], device=tensor.device, dtype=torch.float32)
    return tensor * (1 + 0.02 * (2.3 * places).sin()).to(tensor.dtype).view(shape)
