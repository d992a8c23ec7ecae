"""The causal language-model loss of a whole batch, from logits of this rank's span only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention.distributed.collectives import sum_over_ranks
from sp_attention.distributed.peers import Peers
from sp_attention.loss.tiled_loss import LMHeadInput


@dataclass(frozen=True, eq=False)
class LogitsInProgress:
    """What became of the logits in a forward in progress.

    is_sharded: they are of this rank's span. lm_head_input: what they are made of, where that is left to the loss.
    """

    is_sharded: bool
    lm_head_input: LMHeadInput | None


def sharded_causal_loss(
    whole: Callable[..., Tensor], peers: Peers, in_progress: Callable[[], LogitsInProgress]
) -> Callable[..., Tensor]:
    """A model's `loss_function` that takes logits of the whole sequence, of this rank's span of it, or none at all.

    `whole` is transformers' ForCausalLMLoss, which whole logits are given to, with labels of whatever shape. No logits
    are given where the loss makes them in tiles, of what the LM head was given in the forward that is `in_progress`.
    For a span the labels are shifted at global length first, so that the last token of a span keeps its target; then
    each rank sums over its own targets and the sum of all is divided by what transformers divides by: the number of
    targets in the whole batch, or `num_items_in_batch`. The result is the same on every rank, and NaN where
    transformers' is. Raises IndexError on every rank for a target that is no token, as cross entropy does.
    """

    def sum_in_tiles(targets: Tensor, ignore_index: int) -> Tensor:
        given = in_progress().lm_head_input
        assert given is not None
        return given.loss(targets, ignore_index)

    def is_sharded() -> bool:
        return in_progress().is_sharded

    # A compiled model runs these as they are: they look at values, call the LM head, and ask for what changes.
    require_tokens, in_tiles = torch.compiler.disable(_require_tokens), torch.compiler.disable(sum_in_tiles)
    sharded_now = torch.compiler.disable(is_sharded)

    def loss(
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """logits [B, S | s | 0, V], labels and shift_labels [B, S] int64 → a float32 scalar."""
        targets = shift_labels if shift_labels is not None else labels
        if targets is None or not sharded_now():
            return whole(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if shift_labels is None:
            targets = F.pad(targets, (0, 1), value=ignore_index)[:, 1:]
        targets = targets.to(logits.device)
        require_tokens(targets, vocab_size, ignore_index)
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        span = peers.span(targets.shape[1])
        targets = targets[:, span.start : span.stop]
        if logits.shape[1]:
            rows = logits.float().reshape(-1, vocab_size)
            mine = F.cross_entropy(rows, targets.reshape(-1), ignore_index=ignore_index, reduction="sum")
        else:
            mine = in_tiles(targets, ignore_index)
        return sum_over_ranks(mine, peers) / (count.to(mine.device) if isinstance(count, Tensor) else count)

    return loss


def _require_tokens(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """In the whole batch, on every rank, since only the rank of that span would fail on it."""
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")
