"""The ranks that share a sequence, seen from one of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sp_attention.distributed.buffer_pool import BufferPool
from sp_attention.distributed.partition import span_of

Result = TypeVar("Result")
Mine = TypeVar("Mine")
# Of the parts of dim 0 that each rank is sent, or sends; None for equal ones.
Sizes = Sequence[int] | None


@dataclass(eq=False)
class Watch:
    """In a rehearsal, where a step may fail on one rank alone and leave the others waiting for it in a collective.

    While a step is watched, on `device`, the ranks tell each other before every collective that they come to it.
    depth: of the steps within each other that are watched.
    """

    device: torch.device | None = None
    depth: int = 0


class PartedError(RuntimeError):
    """The ranks do not do the same in a watched step, which this rank can only end: it has nothing to say itself."""


@dataclass(frozen=True)
class Peers:
    """The ranks that share a sequence, seen from one of them; `rank` counts inside the group.

    What they send each other goes through this class. group: None for a rank alone, which sends nothing, and needs no
    process group. pool: the buffers for what is exchanged.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    watch: Watch = field(default_factory=Watch, compare=False)
    pool: BufferPool = field(default_factory=BufferPool, compare=False)

    @property
    def is_alone(self) -> bool:
        """Nothing is sent. In a process group of one rank it is, to itself."""
        return self.group is None

    def all_to_all(self, received: Tensor, sent: Tensor, into: Sizes, out: Sizes) -> None:
        """Send each rank its part of `sent`, of these sizes of dim 0, and receive one from each."""
        if self.is_alone:
            received.copy_(sent)
        else:
            dist.all_to_all_single(received, sent, into, out, group=self.group)

    def start_all_to_all(self, received: Tensor, sent: Tensor, into: Sizes, out: Sizes) -> Callable[[], None]:
        """`all_to_all` under way: what is returned waits for it, and holds what is sent until then."""
        if self.is_alone:
            received.copy_(sent)
            return lambda: None
        work = dist.all_to_all_single(received, sent, into, out, group=self.group, async_op=True)

        def wait(sent: Tensor = sent) -> None:
            work.wait()

        return wait

    def all_gather(self, mine: Tensor) -> list[Tensor]:
        """What each rank has in place of my tensor, of the same shape."""
        if self.is_alone:
            return [mine]
        received = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(received, mine, group=self.group)
        return received

    def all_gather_object(self, mine: Mine) -> list[Mine]:
        """What each rank has in place of my object."""
        everyone = [mine] * self.size
        if not self.is_alone:
            dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def all_reduce(self, total: Tensor) -> None:
        """Add to my tensor those of all other ranks."""
        if not self.is_alone:
            dist.all_reduce(total, group=self.group)

    def meet(self, *what: int) -> None:
        """Called before a collective, with numbers that tell it from others: its kind, and what all ranks know alike.

        Raises PartedError in a watched step that another rank has ended, or in which it comes to another collective.
        """
        if self.watch.device is not None and len(set(numbers := self._announced(hash(what) | 1))) > 1:
            raise _parted(numbers)

    def watched(self, step: Callable[[], Result], device: torch.device) -> Result:
        """The result of a step that may raise on some ranks only; all ranks return or raise together.

        In a step that is within another one, PartedError means that a rank has ended that one too.
        """
        watch, outer = self.watch, self.watch.device
        watch.device, watch.depth = device, watch.depth + 1
        end = 2 * watch.depth
        try:
            return step()
        finally:
            try:
                # Whoever still comes to a collective is told, and ends up here too.
                while len(set(numbers := self._announced(end))) > 1:
                    if any(_is_end(number) and number < end for number in numbers):
                        raise _parted(numbers)
            finally:
                watch.device, watch.depth = outer, watch.depth - 1

    def _announced(self, number: int) -> list[int]:
        """What each rank announces: an odd number for a collective, for the end of a step twice its depth."""
        everyone = self.all_gather(torch.tensor([number], device=self.watch.device))
        return [int(one) for one in torch.cat(everyone).tolist()]

    def span(self, length: int) -> range:
        """My span of a sequence of `length` tokens."""
        return span_of(self.rank, length, self.size)


def alone() -> Peers:
    """A rank that shares its sequences with nobody."""
    return Peers(None, 0, 1)


def _is_end(number: int) -> bool:
    return number % 2 == 0


def _parted(numbers: list[int]) -> PartedError:
    ended = [f"rank {rank}" for rank, number in enumerate(numbers) if _is_end(number)]
    told = f"{', '.join(ended)} ended this step" if ended else "they come to different collectives"
    return PartedError(f"the ranks part here: {told}")
