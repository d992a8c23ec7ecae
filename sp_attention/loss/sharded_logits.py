"""What stands in `outputs.logits` where logits stay sharded: no tensor, so that nobody takes a span for the whole."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from sp_attention.distributed.collectives import gather
from sp_attention.distributed.peers import Peers
from sp_attention.errors import ShardedLogitsError
from sp_attention.loss.no_tensor import NoTensor


class ShardedLogits(NoTensor):
    """This rank's span of a causal model's logits, in training with labels.

    shape: [B, s, V], of my span. length: S, the tokens of the whole sequence. compute: makes them, or has them.
    Whatever else is asked of it, as if it were a tensor, raises ShardedLogitsError, which says what to do.

    No dataclass: Lightning and FSDP2 take those apart that a model returns, to convert the tensors in them.
    """

    def __init__(self, shape: torch.Size, length: int, peers: Peers, compute: Callable[[], Tensor]) -> None:
        self.shape, self.length, self.peers, self.compute = shape, length, peers, compute

    @property
    def part(self) -> Tensor:
        """[B, s, V], with its gradient path. Where the loss was computed in tiles they are made now, each time anew."""
        return self.compute()

    @property
    def span(self) -> range:
        """The tokens that `part` is of."""
        return self.peers.span(self.length)

    def whole(self) -> Tensor:
        """All logits [B, S, V], on every rank. A collective: every rank of the group must call it."""
        return gather(self.part, self.length, self.peers)

    def __repr__(self) -> str:
        return f"ShardedLogits({list(self.shape)}, tokens {self.span.start} to {self.span.stop} of {self.length})"

    def _refuse(self, *_: Any) -> NoReturn:
        raise ShardedLogitsError(
            f"outputs.logits hold {len(self.span)} of {self.length} tokens: in training with labels a causal model's "
            "logits stay sharded. Use outputs.logits.part, or outputs.logits.whole() on every rank of the group, or "
            "enable(model, whole_logits=True)."
        )

    def __copy__(self) -> "ShardedLogits":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedLogits":
        return self  # A tensor with a gradient path, which it may hold, cannot be copied.

    __reduce_ex__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return next(_found_in((*args, *(kwargs or {}).values())))._refuse()


def _found_in(values: Iterable[Any]) -> Iterator[ShardedLogits]:
    """Those among the arguments of a function; in a list too, as of torch.cat."""
    for value in values:
        if isinstance(value, ShardedLogits):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _found_in(value)
