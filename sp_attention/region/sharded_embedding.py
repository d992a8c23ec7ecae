"""Embeddings that are looked up for my span only, where a model passes them straight into its first layer.

The model goes on with a tensor of the whole shape without memory of its own, which holds NaN, so that whatever else is
computed from it shows; the first layer is given my span in its place. So neither embeddings nor their gradient are ever
of the whole sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sp_attention.region.other_hooks import hooks_of_others


@dataclass(frozen=True, eq=False)
class LookedUp:
    """My span of the embeddings, [B, s, E], and what stands for all of them, [B, S, E]."""

    span: Tensor
    whole: Tensor

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether this stands for the embeddings; a copy does too, as a checkpoint makes of what it recomputes from."""
        return tensor.untyped_storage().data_ptr() == self.whole.untyped_storage().data_ptr()


def looked_up(span: Tensor, length: int) -> LookedUp:
    """My span of the embeddings of `length` tokens."""
    return LookedUp(span, span.new_full((), torch.nan).expand(span.shape[0], length, span.shape[2]))


def can_look_up(module: nn.Embedding, ids: Tensor) -> bool:
    """Whether each rank may look up its span of ids [B, S] alone.

    Not where hooks of others see the embeddings, nor where an id is in no table: then every rank has to say so.
    """
    if ids.dim() != 2 or hooks_of_others(module):
        return False
    return bool(((ids >= 0) & (ids < module.num_embeddings)).all())
