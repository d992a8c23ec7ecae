"""The sequence-parallel region of an enabled model at work: what hooks of all its parts share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sp_attention.distributed.peers import Peers
from sp_attention.distributed.sharded_params import most_of_engine
from sp_attention.loss.tiled_loss import LMHead
from sp_attention.region.context import Context
from sp_attention.region.forward import TOKENS, Forward
from sp_attention.region.plan import RegionPlan

# Of a module: before its forward, with its arguments, or after it.
Hook = Callable[..., Any]


@dataclass
class RegionState:
    """The region of one enabled model, and its forward in progress, if any.

    current: shared with the model's attention function. only_loss: nobody looks at logits, in evaluation either.
    """

    region: RegionPlan
    peers: Peers
    current: Context
    forward: Forward | None = None
    only_loss: bool = False

    def counts(self, rows: int, length: int) -> tuple[int, int]:
        """In how many pieces parts of layers, and in how many tiles the head, are given this batch in training.

        As many on every rank: those of the longest span.
        """
        longest = length if length < self.peers.size else -(-length // self.peers.size)
        pieces = -(-longest // max(1, self.region.piece // max(1, rows))) if self.region.pieces else 1
        return pieces, self.region.head.tiles(rows * longest) if isinstance(self.region.head, LMHead) else 1

    def counts_of_engine(self, forward: Forward, given: dict[str, Any]) -> tuple[int, int] | None:
        """Those of the longest of the sequences that all ranks of an engine have, None where there is no engine.

        If the logits of one are whole, those of none are in tiles.
        """
        if not self.region.pieces and isinstance(self.region.head, str):
            return None
        shapes = [given[name].shape[:2] for name in TOKENS if isinstance(given.get(name), Tensor)]
        pieces, tiles = zip((1, 1), *(self.counts(*shape) for shape in shapes if len(shape) == 2), strict=True)
        is_sharded = (forward.stays_sharded or 0) >= self.peers.size and forward.as_rehearsed
        counts = [max(pieces), max(tiles), not is_sharded]
        most = most_of_engine(counts, forward.model.parameters(), forward.model.device)
        return None if most is None else (most[0], 1 if most[2] else most[1])

    def pieces_of(self, module: nn.Module) -> int:
        """In how many pieces a part of a layer in this mode is given its tokens now."""
        return self.current.pieces if module.training or self.only_loss else 1
