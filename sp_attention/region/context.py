"""What the running code belongs to: a batch's pass through a stack, and the scope in which layers and kernels run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sp_attention.distributed.collectives import gather
from sp_attention.distributed.peers import Peers
from sp_attention.kernels.request import Mask
from sp_attention.region.sequence_dims import Along, Extent
from sp_attention.region.sharded_embedding import LookedUp
from sp_attention.ulysses.grid import Grid
from sp_attention.ulysses.head_plan import HeadPlan

Value = TypeVar("Value")


@dataclass(eq=False)
class StackPass:
    """A batch on its way through a stack of layers: its length, my span, and what was cut out of what.

    extent: B and S of the whole batch, of its new tokens where a cache holds others. fills_cache: its layers fill one.
    is_separate: each layer cuts its arguments and gathers its results. gathered: these layers run on whole tensors
    although they need not, for what others have put into them. is_replicated: every rank does all of it, but
    for heads that it keeps. stays_sharded: nothing is gathered after the last layer.
    mlp_tiles: how many tiles of tokens MLPs and norms of its layers are given.
    seed: of the random numbers that are drawn in it. states: those of the generators at its beginning, where numbers
    are drawn around it, and must not be in it. embedded: my span of what its first layer is given, if that is all
    that was looked up. pending: the names of the layers that backward has not run again.
    """

    extent: Extent
    peers: Peers
    fills_cache: bool = False
    is_separate: bool = False
    is_replicated: bool = False
    stays_sharded: bool = False
    mlp_tiles: int = 1
    seed: int | None = None
    states: list[Tensor] | None = None
    embedded: LookedUp | None = None
    gathered: frozenset[str] = frozenset()
    pending: set[str] = field(default_factory=set)
    # A tensor that is a key is alive, so that none other is taken for it.
    _spans: dict[Tensor, dict[Along, Tensor]] = field(default_factory=dict)
    _wholes: dict[Tensor, Tensor] = field(default_factory=dict)

    @property
    def span(self) -> range:
        return self.peers.span(self.extent.length) if self.is_shared else range(self.extent.length)

    @property
    def mine(self) -> Extent:
        """B and s: the size of my span."""
        return Extent(self.extent.batch, len(self.span))

    @property
    def is_shared(self) -> bool:
        """A sequence shorter than the ranks are many is not cut: every rank does all of it."""
        return self.extent.length >= self.peers.size and not self.is_replicated

    def runs_again_as(self, other: "StackPass") -> bool:
        """Whether a layer that backward runs again does in either the same."""
        names = (
            "extent",
            "fills_cache",
            "is_separate",
            "gathered",
            "is_replicated",
            "stays_sharded",
            "mlp_tiles",
            "seed",
        )
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def is_span(self, tensor: Tensor, along: Along) -> bool:
        return tensor.shape[along.dim] == along.size(self.mine)

    def is_whole(self, tensor: Tensor, along: Along) -> bool:
        return tensor.shape[along.dim] == along.size(self.extent)

    def cut(self, whole: Tensor, along: Along, remember: bool = False) -> Tensor:
        """My span of a whole tensor. With `remember`, what every layer is given, such as rotary tables, is cut once."""

        def cut() -> Tensor:
            return along.cut(whole, self.span.start, self.span.stop, self.extent)

        return self._remembered(whole, along, cut) if remember else cut()

    def cut_after(self, whole: Tensor, along: Along) -> Tensor:
        """What ends with my span of a tensor that is of the tokens in a cache too: all but what comes after it."""
        others = self.extent.length - self.span.stop
        return self._remembered(whole, along, lambda: whole.narrow(along.dim, 0, whole.shape[along.dim] - others))

    def _remembered(self, whole: Tensor, along: Along, cut: Callable[[], Tensor]) -> Tensor:
        if whole.requires_grad:
            return cut()
        spans = self._spans.setdefault(whole, {})
        if along not in spans:
            spans[along] = cut()
            self._wholes[spans[along]] = whole
        return spans[along]

    def whole(self, span: Tensor, along: Along) -> Tensor:
        """The whole tensor of which I have my span: the one it was cut from, or gathered from all ranks."""
        if span in self._wholes:
            return self._wholes[span]
        if not self.is_shared:
            return span
        if not along.rows:
            return gather(span, self.extent.length, self.peers, along.dim)
        rows: Tensor = span.unflatten(0, (self.mine.batch, self.mine.length))
        return gather(rows, self.extent.length, self.peers, 1).flatten(0, 1)

    def original(self, value: Value) -> Value | Tensor:
        """The whole tensor that a remembered span was cut from; anything else as it is."""
        return self._wholes.get(value, value) if isinstance(value, Tensor) else value


@dataclass(frozen=True, eq=False)
class Scope:
    """What the running code belongs to.

    stack_pass: None outside of the stacks and in what is given whole tensors. weights: the user wants those of
    attention. given: the tensors that the models around the stacks were given. ignored: the names of arguments that
    nothing in the layers reads.
    is_known: False outside of forwards, and of those recomputations in backward that are tied to theirs; then nothing
    tells what runs.
    mlp_tiles: how many tiles of tokens MLPs and norms are given.
    attend: what takes the place of attention, in a layer that runs on its own to see what it does; None else.
    """

    stack_pass: StackPass | None = None
    weights: bool = False
    given: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    ignored: frozenset[str] = frozenset()
    is_known: bool = False
    mlp_tiles: int = 1
    attend: Callable[..., Tensor] | None = None


@dataclass(eq=False)
class Context:
    """The scope of now, shared by an enabled model's hooks, caches and attention function.

    rehearses: in `enable`; random numbers are made harmless, so that they need no seeds. plans: how attention of so
    many query and KV heads was shared last, without a cache.
    Each transition is a context manager: into a model, a layer, a module on whole tensors, a recomputation.
    """

    scope: Scope = field(default_factory=Scope)
    rehearses: bool = False
    plans: dict[tuple[int, int], HeadPlan | Grid] = field(default_factory=dict)
    _kept_heads: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    @property
    def stack_pass(self) -> StackPass | None:
        return self.scope.stack_pass

    def model(self, given: Iterable[Tensor], weights: bool, ignored: frozenset[str] = frozenset()) -> "Transition":
        """In the model that was called, with these tensors; behind it nothing is known, whatever was before."""
        into = Scope(weights=weights, given=_weakly(given), ignored=ignored, is_known=True)
        return Transition(self, into, after=Scope())

    def inner_model(self, given: Iterable[Tensor]) -> "Transition":
        """In a model inside of the one that was called."""
        return Transition(self, replace(self.scope, given=_weakly([*self.scope.given, *given])))

    def layer(self, stack_pass: StackPass | None, mlp_tiles: int, scope: Scope | None = None) -> "Transition":
        """In a layer: on my span of a pass, or on whole tensors. `scope`: that of its model, where it is not now's."""
        return Transition(self, replace(scope or self.scope, stack_pass=stack_pass, mlp_tiles=mlp_tiles))

    def gathered(self, stack_pass: StackPass | None = None) -> "Transition":
        """In a module of a layer that is given whole tensors; in a replicated pass if it fills a cache."""
        return Transition(self, replace(self.scope, stack_pass=stack_pass))

    def recomputation(self, scope: Scope) -> "Transition":
        """In what backward runs again of a scope that was left."""
        return Transition(self, scope)

    def alone(self, attend: Callable[..., Tensor]) -> "Transition":
        """In a layer that runs on its own, with something else in place of attention, and without our hooks."""
        return Transition(self, Scope(is_known=True, attend=attend))

    def keep(self, keys: Tensor, heads: int) -> None:
        """Note that keys are of the heads that this rank keeps in a cache, of `heads` in all."""
        self._kept_heads[keys] = heads

    def heads_kept(self, keys: Tensor) -> int | None:
        """Of how many heads these are the keys of those that this rank keeps; None for keys of all heads."""
        heads: int | None = self._kept_heads.get(keys)
        return heads


class Transition:
    """From the scope of now into another, and back. No generator, which would go back whenever it is collected."""

    def __init__(self, context: Context, into: Scope, after: Scope | None = None) -> None:
        self._context, self._into, self._after = context, into, after

    def __enter__(self) -> None:
        self._before, self._context.scope = self._context.scope, self._into

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.scope = self._before if self._after is None else self._after


@dataclass(eq=False)
class PassesOfMasks:
    """The passes in which a mask was given to a stack: by it a layer finds its own when backward runs it again.

    So do layers with a checkpoint around their hooks, which is neither transformers' nor within the layer. Of a mask
    that serves several forwards the latest pass is kept, and one before it that backward has not run again as a whole.
    """

    _noted: WeakKeyDictionary[Mask, dict[str, list[tuple[StackPass, Scope]]]] = field(default_factory=WeakKeyDictionary)

    def note(self, mask: Mask, stack: str, stack_pass: StackPass, scope: Scope) -> None:
        """Note a pass through a stack, in the scope of its model."""
        noted = self._noted.setdefault(mask, {})
        others = [pair for pair in noted.get(stack, []) if pair[0].pending and not pair[0].runs_again_as(stack_pass)]
        noted[stack] = [*others[:1], (stack_pass, scope)]

    def find(self, mask: Mask, stack: str) -> list[tuple[StackPass, Scope]]:
        """The pass through a stack that has a mask; two where nothing tells which of them it is."""
        return self._noted.get(mask, {}).get(stack, [])


def _weakly(tensors: Iterable[Any]) -> WeakTensorKeyDictionary:
    """A set of tensors that does not keep them alive."""
    return WeakTensorKeyDictionary({tensor: True for tensor in tensors})
