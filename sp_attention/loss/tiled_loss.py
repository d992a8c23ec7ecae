"""The loss of a causal model, a tile of logits at a time: in long sequences all of them would take the most memory.

The head is given no tokens when the model calls it, and the loss calls it again with some at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sp_attention.distributed.once_differentiable import once_differentiable
from sp_attention.distributed.sharded_params import belongs_to_engine
from sp_attention.loss.chunked_grad import ChunkedGrad, in_tiles

# A tile is of tokens whose logits are 64 MiB in float32, and of enough of them to keep matrix products fast.
_LOGITS, _TOKENS = 2**24, 512


@dataclass(frozen=True)
class LMHead:
    """A module that makes logits [B, s, V] of hidden states [B, s, E], and the steps that come between it and the loss.

    name: of the module in its model. vocabulary: V, after the steps. tile: the number of tokens that it is given at a
    time. liger: Liger's kernel does the loss and the head in one.
    """

    module: nn.Module
    name: str
    steps: tuple[Callable[[Tensor], Tensor], ...]
    vocabulary: int
    tile: int
    liger: bool = False

    def tiles(self, tokens: int) -> int:
        """How many there are of so many tokens."""
        return -(-tokens // self.tile)


@dataclass(frozen=True, eq=False)
class LMHeadInput:
    """What a head was given in a forward: hidden states [B, s, E] of which logits are made later.

    tiles: how many, the same number on every rank, since engines that gather the head's weights do so for each.
    autocast: the context that the head was called in.
    """

    head: LMHead
    module: nn.Module
    hidden: Tensor
    tiles: int
    autocast: Callable[[], AbstractContextManager[Any]]

    @property
    def shape(self) -> torch.Size:
        """[B, s, V], of all logits."""
        return torch.Size([*self.hidden.shape[:-1], self.head.vocabulary])

    def logits(self, weights: Mapping[str, Tensor]) -> Tensor:
        """[B, s, V], with their gradient path, by these weights in place of the module's."""
        return self._logits(self.hidden, weights)

    def loss(self, targets: Tensor, ignore_index: int) -> Tensor:
        """targets [B, s] → the sum of their losses, a float32 scalar. Its gradients need no logits later."""
        hidden, targets = self.hidden.flatten(0, 1), targets.flatten()
        # The engine follows the calls of the module, and of no other function of its weights.
        engine = any(map(belongs_to_engine, self.module.parameters()))
        fused = None if engine else self._fused()
        loss_of = partial(fused or self._loss, ignore_index)
        tiles = partial(in_tiles, 1 if fused else self.tiles, 0)
        learned = {name: one for name, one in self.module.named_parameters() if one.requires_grad}
        if not (torch.is_grad_enabled() and (hidden.requires_grad or learned)):
            return torch.stack([loss_of({}, *tile) for tile in tiles(hidden, targets)]).sum()
        if engine:
            again = partial(checkpoint, partial(loss_of, {}), use_reentrant=False, preserve_rng_state=False)
            return torch.stack([again(*tile) for tile in tiles(hidden, targets)]).sum()
        counted = targets != ignore_index
        loss: Tensor = _AtOnce.apply(loss_of, tiles, [*learned], hidden, targets, counted, *learned.values())  # type: ignore[no-untyped-call]  # torch has no types for it
        return loss

    def _logits(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        with self.autocast():
            logits: Tensor = functional_call(self.module, dict(weights), hidden)
            for step in self.head.steps:
                logits = step(logits)
        return logits

    def _loss(self, ignore_index: int, weights: Mapping[str, Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
        """[n, E] and [n] → the sum of the losses of n tokens, with `weights` in place of some of the head's."""
        # The head gets a batch of one row, as in the rehearsal it got a batch. ForCausalLMLoss computes in float32.
        logits = self._logits(hidden[None], weights).float().flatten(0, 1)
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")

    def _fused(self) -> Callable[..., Tensor] | None:
        """What does the head and the loss in one, given all tokens; None where nothing does exactly that, by less."""
        # Anew in each forward: hooks and adapters may have come since.
        if self.head.liger and _is_bare(self.module):
            return self._by_liger
        device = self.hidden.device.type
        with self.autocast():  # Which torch's function does not follow.
            autocast = device != "meta" and torch.is_autocast_enabled(device)
        # Where it takes less (docs/speed.md). In half precision it takes more, and rounds the sum of losses to that.
        # Without memory, as for `sp-attention plan`, float32 is that of a CPU.
        in_float32 = device in ("cpu", "meta") and self.hidden.dtype == torch.float32 and not autocast
        return self._by_torch if in_float32 and torch_does(self.head, self.module) else None

    def _by_torch(self, ignore_index: int, weights: Mapping[str, Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
        own = {**dict(self.module.named_parameters()), **weights}
        return F.linear_cross_entropy(
            hidden,
            own["weight"],
            targets,
            linear_bias=own.get("bias"),
            reduction="sum",
            ignore_index=ignore_index,
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=self.head.tile),
        )

    def _by_liger(self, ignore_index: int, weights: Mapping[str, Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        own = {**dict(self.module.named_parameters()), **weights}
        fused = LigerFusedLinearCrossEntropyLoss(ignore_index=ignore_index, reduction="sum", accum_dtype=torch.float32)
        with self.autocast():
            loss: Tensor = fused(own["weight"], hidden, targets, own.get("bias"))
        return loss.float()


def tile_for(vocabulary: int) -> int:
    """How many tokens' logits are a tile, where nobody says."""
    return max(_TOKENS, _LOGITS // vocabulary)


def liger_does(head: LMHead) -> bool:
    """Whether Liger's kernel is there, and can do this head: one matrix, and nothing after it, on a GPU."""
    module = head.module
    if not _is_bare(module) or head.steps:
        return False
    return module.weight.is_cuda and module.weight.dtype != torch.float64 and find_spec("liger_kernel") is not None


def torch_does(head: LMHead, module: nn.Module) -> bool:
    """Whether torch's `linear_cross_entropy` can do this head in a forward: one matrix, and nothing after it."""
    # One hook before it is ours, by which the head is given no tokens.
    if not _is_bare(module) or len(module._forward_pre_hooks) > 1 or head.steps:
        return False
    return type(module.weight) is nn.Parameter


def _is_bare(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether nothing notices that its weights are used without a call of it."""
    hooks = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.Linear and "forward" not in vars(module) and not any(hooks)


class _AtOnce(torch.autograd.Function):
    """The sum of the losses of all tiles, with their gradients computed right after each, as in Liger's kernel.

    So logits are made once only. In the end the gradients are multiplied by that of the sum, on which they depend
    linearly. Those of weights are added up in float32 where weights are less precise. What is not `counted`, no target,
    has zeros whatever that gradient is: infinite, where nothing of a batch is a target and its loss is 0 / 0.
    Hsu et al. 2024 (arXiv 2410.10989), section 3.2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss_of: Callable[..., Tensor],
        tiles: Callable[..., list[tuple[Tensor, ...]]],
        names: list[str],
        hidden: Tensor,
        targets: Tensor,
        counted: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        grads = ChunkedGrad(hidden, 0, hidden.requires_grad, dict(zip(names, weights, strict=True)))
        losses = [grads.add(loss_of, *tile) for tile in tiles(hidden, targets)]
        ctx.save_for_backward(grads.hidden, counted, *grads.of_weights)
        ctx.dtypes = [weight.dtype for weight in weights]
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_of_hidden, counted, *sums = ctx.saved_tensors
        weights = _times(grad.where(counted.any(), 0), sums, ctx.dtypes)
        if grad_of_hidden is not None:
            grad_of_hidden = (grad_of_hidden * grad).masked_fill_(~counted[:, None], 0)
        return None, None, None, grad_of_hidden, None, None, *weights


def _times(grad: Tensor, sums: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    return [
        None if one is None else torch.mul(one, grad, out=torch.empty_like(one, dtype=dtype))
        for one, dtype in zip(sums, dtypes, strict=True)
    ]
