"""The ranks that share a sequence, seen from one of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from sp_attention.distributed.buffer_pool import BufferPool
from sp_attention.distributed.partition import span_of

Result = TypeVar("Result")


@dataclass(eq=False)
class Watch:
    """In a rehearsal, where a step may fail on one rank alone and leave the others waiting for it in a collective.

    While a step is watched, on `device`, the ranks tell each other before every collective that they come to it.
    """

    device: torch.device | None = None


@dataclass(frozen=True)
class Peers:
    """The ranks that share a sequence, seen from one of them; `rank` counts inside the group.

    pool: the buffers for what is exchanged.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    watch: Watch = field(default_factory=Watch, compare=False)
    pool: BufferPool = field(default_factory=BufferPool, compare=False)

    def meet(self, *what: int) -> None:
        """Called before a collective, with numbers that tell it from others: its kind, and what all ranks know alike.

        Raises RuntimeError in a watched step that another rank has ended, or in which it comes to another collective.
        """
        if self.watch.device is not None and len(set(self._announced(hash(what) | 1))) > 1:
            raise RuntimeError("the ranks part here: another one ended this step, or went on otherwise")

    def watched(self, step: Callable[[], Result], device: torch.device) -> Result:
        """The result of a step that may raise on some ranks only; all ranks return or raise together."""
        self.watch.device = device
        try:
            return step()
        finally:
            # Whoever still comes to a collective is told, and ends up here too.
            while any(self._announced(0)):
                pass
            self.watch.device = None

    def _announced(self, number: int) -> list[int]:
        """What each rank announces: 0 for the end of a step."""
        numbers = torch.empty(self.size, dtype=torch.int64, device=self.watch.device)
        mine = torch.tensor([number], device=self.watch.device)
        dist.all_gather(list(numbers.split(1)), mine, group=self.group)
        return [int(one) for one in numbers.tolist()]

    def span(self, length: int) -> range:
        """My span of a sequence of `length` tokens."""
        return span_of(self.rank, length, self.size)
