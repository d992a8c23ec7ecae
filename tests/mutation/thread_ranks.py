"""Ranks as threads of one process, with the few collectives that the library calls: tests of them take milliseconds.

A rank that ends, or comes to another collective than the others, ends them all, so none of them waits forever.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sp_attention.distributed.peers import Peers

# Only a rank that never comes to anything at all, in an endless loop, makes the others wait so long.
SECONDS = 60


class Ranks:
    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.given: list[Any] = [None] * size

    def exchange(self, rank: int, name: object, value: Any) -> list[Any]:
        """What every rank gives to the collective of this name."""
        self.given[rank] = name, value
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        names = [name for name, _ in given]
        if any(name != names[0] for name in names):
            raise RuntimeError(f"the ranks part: {names}")
        return [value for _, value in given]


@dataclass(frozen=True, eq=False)
class ThreadGroup:
    """A process group as one of its ranks has it."""

    ranks: Ranks
    rank: int

    def all_gather(self, outputs: list[Tensor], tensor: Tensor) -> None:
        everyone = self.ranks.exchange(self.rank, "all_gather", tensor.detach().clone())
        for output, given in zip(outputs, everyone, strict=True):
            assert (output.shape, output.dtype) == (given.shape, given.dtype)
            output.copy_(given)

    def all_gather_object(self, outputs: list[Any], value: Any) -> None:
        outputs[:] = self.ranks.exchange(self.rank, "all_gather_object", value)

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(sum(self.ranks.exchange(self.rank, "all_reduce", tensor.detach().clone())))

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, received: list[int] | None, sent: list[int] | None
    ) -> None:
        size = self.ranks.size
        received = received or [len(output) // size] * size
        sent = sent or [len(tensor) // size] * size
        assert output.is_contiguous()
        assert (sum(received), sum(sent)) == (len(output), len(tensor))
        parts = [part.detach().clone() for part in tensor.split(sent)]
        everyone = self.ranks.exchange(self.rank, "all_to_all_single", parts)
        for part, given in zip(output.split(received), everyone, strict=True):
            assert (part.shape, part.dtype) == (given[self.rank].shape, given[self.rank].dtype)
            part.copy_(given[self.rank])


# In place of what torch.distributed has under these names.
def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None) -> None:
    group.all_gather(tensor_list, tensor)


def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    group.all_gather_object(object_list, obj)


def all_reduce(tensor: Tensor, group: Any = None) -> None:
    group.all_reduce(tensor)


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> "Later | None":
    if async_op:
        return Later(output, input, output_split_sizes, input_split_sizes, group)
    group.all_to_all_single(output, input, output_split_sizes, input_split_sizes)
    return None


@dataclass(frozen=True)
class Later:
    """A collective under way, of which nothing has arrived before somebody waits for it."""

    output: Tensor
    input: Tensor
    received: list[int] | None
    sent: list[int] | None
    group: Any

    def wait(self) -> None:
        self.group.all_to_all_single(self.output, self.input, self.received, self.sent)


COLLECTIVES = (all_gather, all_gather_object, all_reduce, all_to_all_single)


@dataclass(frozen=True)
class ThreadPeers(Peers):
    """Peers that compare, before every collective, what they know of it; `met` keeps it."""

    met: list[tuple[int, ...]] = field(default_factory=list, compare=False)

    def meet(self, *what: int) -> None:
        self.met.append(what)
        self.group.ranks.exchange(self.rank, ("meet", what), None)


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(peers, *arguments)` returns on every rank; raises what one of them raises."""
    ranks = Ranks(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = function(ThreadPeers(ThreadGroup(ranks, rank), rank, size), *arguments)
            ranks.exchange(rank, "the end", None)
        except BaseException as error:
            errors.append(error)
            ranks.barrier.abort()

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # Those that were waiting for it are told of nothing but a broken barrier.
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results


def random(*shape: int, seed: int = 0) -> Tensor:
    """The same float64 numbers each time."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class OnADevice(TorchFunctionMode):
    """While it is on, no tensor may be made without saying on which device: those that are given may be on another."""

    factories = (torch.tensor, torch.empty, torch.zeros, torch.ones, torch.arange)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert function not in self.factories or kwargs.get("device") is not None, function
        assert function is not Tensor.to or None not in args
        return function(*args, **kwargs)
