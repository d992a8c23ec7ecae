"""The bytes that are alive while code runs on tensors without memory, and what they are for when they are most."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from sp_attention.cli.planning.peaks import EXCHANGE, LAYER
from sp_attention.region.pytree import tensors


class Live(TorchDispatchMode):
    """Counts storages that are made within it, from then until nobody holds them, by part of a plan.

    now: the bytes that are alive. most: the same when all of them together were most. sent: bytes that went to each
    rank of a group in all-to-all calls, but for those to itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.sent: Counter[int] = Counter()
        self._making = LAYER
        self._kinds: dict[int, str] = {}

    def begin(self) -> None:
        """Look for the most, and count what is sent, anew."""
        self.most, self.sent = self.now.copy(), Counter()

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made meanwhile is of this kind."""
        before, self._making = self._making, kind
        try:
            yield
        finally:
            self._making = before

    def are(self, kind: str, some: Sequence[Tensor]) -> None:
        """These, as far as they were made within it, are of this kind from now on."""
        for storage in (tensor.untyped_storage() for tensor in some):
            if id(storage) in self._kinds:
                self.now[self._kinds[id(storage)]] -= storage.nbytes()
                self.now[kind] += storage.nbytes()
                self._kinds[id(storage)] = kind

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = without_values(func, args, kwargs or {})
        if func.namespace == "c10d" and func.overloadpacket.__name__ == "alltoall_base_":
            self._note_exchange(*args[:5])
        given = {id(one.untyped_storage()) for _, one in tensors(args)}
        for _, tensor in tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in given:
                self._note(storage)
        return result

    def _note(self, storage: UntypedStorage) -> None:
        if id(storage) in self._kinds:
            return
        self._kinds[id(storage)] = self._making
        self.now[self._making] += storage.nbytes()
        if self.now.total() > self.most.total():
            self.most = self.now.copy()
        finalize(storage, self._gone, id(storage), storage.nbytes()).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.now[self._kinds.pop(key)] -= size

    def _note_exchange(
        self, received: Tensor, sent: Tensor, group: Any, from_each: list[int], to_each: list[int]
    ) -> None:
        self.are(EXCHANGE, (received, sent))
        ranks, me = dist.get_world_size(), dist.get_rank()
        sizes = [size * sent[:1].numel() for size in to_each] or [sent.numel() // ranks] * ranks
        for rank, size in enumerate(sizes):
            if rank != me:
                self.sent[rank] += size * sent.element_size()


def without_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns on tensors without memory, for which torch does not tell it of all.

    What a model asks of values is answered with yes: there is no padding, and a row is one document.
    """
    if func is torch.ops.aten._grouped_mm.default:
        return _grouped(*args, **kwargs)
    if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
        return True
    return func(*args, **kwargs)


def _grouped(one: Tensor, other: Tensor, offsets: Tensor, *more: Any, **options: Any) -> Tensor:
    """A grouped product of experts, forward or of weights' gradients: torch tells its shape in bfloat16 only."""
    if other.dim() == 3:
        return one.new_empty(one.shape[0], other.shape[2])
    return one.new_empty(len(offsets), one.shape[0], other.shape[1])
