"""One rank's part of a training step, run on tensors without memory: what is alive at most, layer by layer.

The layers are those of transformers, on this rank's span of the tokens; what is between them and other ranks is this
library's own code, on a process group that torch fakes. Only the kernel of attention is a stand-in, which keeps what
fused kernels keep: its arguments, its output, and a number for each query and head.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from sp_attention.cli.planning.live import Live
from sp_attention.cli.planning.meta_model import META, Given, MetaModel, hidden_path, with_hidden
from sp_attention.cli.planning.peaks import ATTENTION, GRADIENTS, Parts, Phases
from sp_attention.distributed.partition import span_of
from sp_attention.distributed.peers import Peers
from sp_attention.errors import Refused
from sp_attention.kernels.request import Backend, Mask, Request
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput, tile_for
from sp_attention.region.attn_implementation import attend_by
from sp_attention.region.context import Context, StackPass
from sp_attention.region.mixer_calls import put_in_place, take_away
from sp_attention.region.plan import RegionPlan
from sp_attention.region.pytree import tensors
from sp_attention.region.sequence_dims import Extent
from sp_attention.region.state import RegionState
from sp_attention.region.tiled_mlp import around_tiled
from sp_attention.ulysses import attention as ulysses

_KEY = "sp_attention_plan"
# Of each token its id, its label, and its target, which is the label of the next.
BATCH_NUMBERS = 3


@dataclass(frozen=True)
class Share:
    """What a rank of `ranks` does of `batch` rows of `length` tokens: a span. mlp_tile, loss_tile: as of `enable`."""

    batch: int
    length: int
    ranks: int
    mlp_tile: int | None = None
    loss_tile: int | None = None

    @property
    def rank(self) -> int:
        """One that has most to do: the first if there is another at its side only, else one between two others."""
        return 1 if self.ranks > 2 else 0

    @property
    def span(self) -> int:
        return len(span_of(self.rank, self.length, self.ranks))


def parts_of_step(meta: MetaModel, share: Share) -> Parts:
    """What each part of a step takes: each kind of layer, and the end, are run on their own."""
    with _among_others(share) as peers, ExitStack() as undo:
        rank = _Rank(meta, share, peers, Live(), Context())
        attend_by(meta.model, _KEY, rank.attend, _no_mask, undo)
        if peers is not None:
            rank.put_in_place(undo)
        given = meta.given(share.batch, share.span)
        return Parts(
            {kind: rank.layer(kind, one) for kind, one in given.items()},
            {kind: rank.layer(kind, one, again=True) for kind, one in given.items()},
            rank.end(),
            given[meta.layers[0]].hidden.nbytes,
            _tables(meta, share) + BATCH_NUMBERS * 8 * share.batch * share.length,
            meta.embedding.nbytes,
        )


@contextmanager
def _among_others(share: Share) -> Iterator[Peers | None]:
    """Ranks that are not there, and to which nothing is sent."""
    if share.ranks == 1:
        yield None
        return
    dist.init_process_group("fake", rank=share.rank, world_size=share.ranks, store=FakeStore())
    try:
        world = dist.group.WORLD
        assert world is not None
        yield Peers(world, share.rank, share.ranks)
    finally:
        dist.destroy_process_group()


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """In place of a mask: the stand-in for a kernel does not look at any."""


def _tables(meta: MetaModel, share: Share) -> int:
    """They are of the whole sequence on every rank."""
    found: dict[int, int] = {}
    for one in meta.given(share.batch, share.length).values():
        found |= one.tables
    return sum(found.values())


@dataclass(frozen=True, eq=False)
class _Rank:
    """A rank, with `peers` None if it is alone."""

    meta: MetaModel
    share: Share
    peers: Peers | None
    live: Live
    context: Context

    def put_in_place(self, undo: ExitStack) -> None:
        """Let mixers share their work, and MLPs and norms be given tiles of tokens, as in an enabled model."""
        assert self.peers is not None
        for calls in (calls for kind in self.meta.kinds.values() for calls in kind.calls):
            put_in_place(calls, self.context)
            undo.callback(take_away, calls)
        if self.share.mlp_tile is None:
            return
        nothing = RegionPlan((), (self.meta.model,), {}, None, Refused("nothing is enabled"))
        state = RegionState(nothing, self.peers, self.context)
        tiles = -(-self.share.span // max(1, self.share.mlp_tile // self.share.batch))
        around = around_tiled(lambda _: tiles, draws=False)
        for module in (module for kind in self.meta.kinds.values() for module in kind.tileable):
            for handle in state.hook_around(module, around):
                undo.callback(handle.remove)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """transformers' calling convention: [B, H, s, D] → [B, s, H, Dv]."""
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        length = self.share.length
        request = Request(query, key, value, Mask(self.share.batch, length, length, query.device), scale=1.0)
        if self.peers is None:
            return self.kernel(request), None
        kernel = ulysses.Kernel(Backend("any", _KEY, self.kernel))
        plan = ulysses.plan_of(request, self.peers.size, kernel)
        return ulysses.attend(request, length, plan, self.peers, kernel)[0], None

    def kernel(self, request: Request) -> Tensor:
        """The stand-in: [B, Sq, h, Dv]."""
        given = (request.query, request.key, request.value)
        self.live.are(ATTENTION, given)
        with self.live.making(ATTENTION):
            result: Tensor = _Kernel.apply(self.live, *given)  # type: ignore[no-untyped-call]  # torch has no types for it
        return result

    def layer(self, kind: int, given: Given, *, again: bool = False) -> Phases:
        """again: it is checkpointed, and runs again in backward."""
        module = self.meta.kinds[kind].module

        def run(hidden: Tensor) -> Tensor:
            args, kwargs = given.with_hidden(hidden)
            output = checkpoint(module, *args, use_reentrant=False, **kwargs) if again else module(*args, **kwargs)
            return dict(tensors(output))[hidden_path(output, *hidden.shape[:2])]

        return self._phases(run, given.hidden, module)

    def end(self) -> Phases:
        """What comes after the layers, of whole logits where nothing is enabled."""
        meta, share = self.meta, self.share
        targets = torch.zeros(share.batch, share.span, dtype=torch.int64, device=META)
        hidden = meta.given(share.batch, share.span)[meta.layers[-1]].hidden

        def run(hidden: Tensor) -> Tensor:
            def skip(kind: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return with_hidden(meta.kinds[kind].result, hidden)

            if self.peers is None:
                loss: Tensor = meta.run(meta.model, share.batch, share.span, skip, labels=targets).loss
                return loss
            last = meta.run(meta.base(), share.batch, share.span, skip).last_hidden_state
            vocabulary = meta.vocabulary
            head = LMHead(meta.head, "head", (), vocabulary, share.loss_tile or tile_for(vocabulary))
            tokens = last[..., 0].numel()
            # Of float32, which torch does in one operator, nothing tells what is made within: logits and gradients.
            within = last.new_empty(2, min(tokens, head.tile), vocabulary) if last.dtype == torch.float32 else None
            loss = LMHeadInput(head, meta.head, last, head.tiles(tokens), nullcontext).loss(targets, -100)
            del within
            return loss

        return self._phases(run, hidden, meta.model)

    def _phases(self, run: Callable[[Tensor], Tensor], like: Tensor, module: nn.Module) -> Phases:
        live, hidden = self.live, torch.empty_like(like).requires_grad_()
        parameters = [*module.parameters()]
        handles = [
            one.register_post_accumulate_grad_hook(lambda one: live.are(GRADIENTS, [one.grad])) for one in parameters
        ]
        with self._on_my_span(), live:
            live.begin()
            out = run(hidden)
            forward, kept, returned, sent = live.most, live.now.copy(), out.nbytes, live.sent
            # Nothing of what was returned is held on to, nor of its gradient, which comes out of the graph.
            edge = get_gradient_edge(_End.apply(out))  # type: ignore[no-untyped-call]  # torch has no types for it
            del out
            live.begin()
            torch.autograd.backward(edge, torch.empty((), device=META))
            backward, sent_back = live.most, live.sent
        gradients = sum(one.grad.nbytes for one in parameters if one.grad is not None)
        for one in parameters:
            one.grad = None
        for handle in handles:
            handle.remove()
        return Phases(forward, kept, backward, returned, gradients, sent, sent_back)

    @contextmanager
    def _on_my_span(self) -> Iterator[None]:
        """Within it modules of layers are given my span of the tokens."""
        if self.peers is None:
            yield
            return
        stack_pass = StackPass(Extent(self.share.batch, self.share.length), self.peers)
        with self.context.layer(stack_pass, 1):
            yield


class _End(torch.autograd.Function):
    """What comes after: of it there is a gradient, and nothing else."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = out.shape, out.dtype
        return torch.empty((), device=META)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype, device=META)


class _Kernel(torch.autograd.Function):
    """Keeps and returns what a fused kernel of attention does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, live: Live, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[3])
        ctx.live = live
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.live.making(ATTENTION):
            return None, *(
                torch.empty_like(one, memory_format=torch.contiguous_format) for one in ctx.saved_tensors[:3]
            )
