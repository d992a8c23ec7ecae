"""The sequence-parallel region of an enabled model at work: what hooks of all its modules share."""

import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from sp_attention.distributed.peers import Peers
from sp_attention.distributed.sharded_params import most_of_engine
from sp_attention.loss.tiled_loss import LMHead
from sp_attention.region.calls import Call
from sp_attention.region.context import Context, PassesOfMasks
from sp_attention.region.forward import Forward, shapes_of_tokens
from sp_attention.region.hook import Hook
from sp_attention.region.length_check import LengthCheck
from sp_attention.region.plan import RegionPlan
from sp_attention.region.unpicklable import Unpicklable

# Around a call of a module: given it and its arguments, yields those that it is called with instead, or None; is sent
# what the module returned, None after an error; and returns what is returned instead, or None.
Around = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Generator[Any, Any, Any]]


@dataclass
class RegionState(Unpicklable):
    """The region of one enabled model, and its forward in progress, if any.

    context: shared with the model's attention function. only_loss: nobody looks at logits, in evaluation either.
    passes: those that backward may run again.
    length_check: what is proven of lengths, None if nothing is. known: what tensors in containers held that ranks have
    compared.
    """

    plan: RegionPlan
    peers: Peers
    context: Context
    forward: Forward | None = None
    only_loss: bool = False
    length_check: LengthCheck | None = None
    passes: PassesOfMasks = field(default_factory=PassesOfMasks)
    known: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _in_progress: list[Call] = field(default_factory=list)
    _entered: nn.Module | None = None

    def tile_counts(self, rows: int, length: int) -> tuple[int, int]:
        """How many tiles of this batch modules of layers, and the LM head, are given in training.

        As many on every rank: those of the longest span.
        """
        plan = self.plan
        longest = length if length < self.peers.size else -(-length // self.peers.size)
        of_mlp = -(-longest // max(1, plan.mlp_tile // max(1, rows))) if plan.tiled_modules else 1
        return of_mlp, plan.lm_head.tiles(rows * longest) if isinstance(plan.lm_head, LMHead) else 1

    def tile_counts_of_engine(self, forward: Forward, given: Mapping[str, Any]) -> tuple[int, int] | None:
        """Those of the longest of the sequences that all ranks of an engine have, None where there is no engine.

        If the logits of one are whole, those of none are in tiles.
        """
        if not self.plan.tiled_modules and not isinstance(self.plan.lm_head, LMHead):
            return None
        counts = [(1, 1), *(self.tile_counts(*shape) for shape in shapes_of_tokens(given))]
        of_mlp, of_head = zip(*counts, strict=True)
        is_sharded = (forward.stays_sharded or 0) >= self.peers.size and forward.as_rehearsed
        most = most_of_engine(
            [max(of_mlp), max(of_head), not is_sharded], forward.model.parameters(), forward.model.device
        )
        return None if most is None else (most[0], 1 if most[2] else most[1])

    def mlp_tiles_of(self, module: nn.Module) -> int:
        """In how many tiles a module of a layer in this mode is given its tokens now."""
        return self.context.scope.mlp_tiles if module.training or self.only_loss else 1

    def hook_around(self, module: nn.Module, around: Around, layer: str = "") -> list[RemovableHandle]:
        """Run `around` around every call of a module: what is before its `yield` before it, and the rest after it.

        layer: the name of the layer that the module is, if it is one.
        """

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.context.scope.attend is not None:
                return None
            self.close_interrupted()
            running = around(module, args, kwargs)
            given = next(running)
            self._in_progress.append(Call(around, running))
            return given

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.context.scope.attend is not None or all(call.around is not around for call in self._in_progress):
                return None  # An error before this call began.
            return _sent(self._end(around), output)

        return [
            module.register_forward_pre_hook(Hook(before, layer), with_kwargs=True),
            # First, so that the hooks of others see what the rest of the model sees; always, so that an error within
            # leaves nothing in progress behind.
            module.register_forward_hook(Hook(after, layer), prepend=True, with_kwargs=True, always_call=True),
        ]

    def enter(self, model: nn.Module) -> None:
        """Note that the hooks of a model have begun a call, which comes to its forward now."""
        self._entered = model

    def has_entered(self, model: nn.Module) -> bool:
        """Whether this call of a model's forward was begun by its hooks; then the next one is another call."""
        entered, self._entered = self._entered is model, None
        return entered

    def run_around(
        self, around: Around, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of a module's own forward with `around` around it, as hooks run it around calls of the module."""
        self.close_interrupted()
        running = around(module, args, kwargs)
        given = next(running)
        self._in_progress.append(Call(around, running, inspect.currentframe()))
        self._entered = None
        args, kwargs = (args, kwargs) if given is None else given
        try:
            output = own(*args, **kwargs)
        except BaseException:
            self._end(around).close()
            raise
        changed = _sent(self._end(around), output)
        return output if changed is None else changed

    def _end(self, around: Around) -> Generator[Any, Any, Any]:
        """What runs around a call that has come to its end; what began since is over."""
        while self._in_progress[-1].around is not around:
            self._in_progress.pop().running.close()
        return self._in_progress.pop().running

    def close_interrupted(self) -> None:
        """End what an interrupt, of which hooks are not told, has left in progress."""
        while self._in_progress and self._in_progress[-1].has_ended:
            self._in_progress.pop().running.close()


def _sent(running: Generator[Any, Any, Any], output: Any) -> Any:
    """What a generator returns when it is sent an output."""
    try:
        running.send(output)
    except StopIteration as end:
        return end.value
    raise RuntimeError(f"{running} yields more than once")
