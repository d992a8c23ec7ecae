"""The two ends of the region: the embedding before the first layer, and the head behind the last."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers.modeling_layers import GradientCheckpointingLayer

from sp_attention.loss.chunked_grad import autocast_of_now
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput
from sp_attention.region.plan import Embedding
from sp_attention.region.sharded_embedding import can_look_up, looked_up
from sp_attention.region.state import Hook, RegionState


def embedding_hooks(running: RegionState, embedding: Embedding, first: nn.Module) -> tuple[Hook, Hook]:
    """Let an embedding look up my span of the tokens, where `first`, the first layer, alone gets what it yields."""
    lengths: list[int] = []

    def before(module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if len(args) == 1 and not kwargs else None
        if ids is None or id(ids) not in running.current.given:
            return None
        if not _looks_up_its_own(running, module, embedding.name, first, ids):
            return None
        lengths.append(ids.shape[1])
        span = running.peers.span(ids.shape[1])
        return (ids[:, span.start : span.stop],), {}

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not lengths:
            return None
        length = lengths.pop()
        if running.forward is None or output is None:
            return None
        running.forward.embedded = looked_up(output, length)
        return running.forward.embedded.whole

    return before, after


def _looks_up_its_own(running: RegionState, module: nn.Embedding, name: str, first: nn.Module, ids: Tensor) -> bool:
    """Whether only my span of the embeddings is looked up: if nobody but the first layer gets to see them.

    A checkpoint around the hooks of the first layer would, which does without gradients, and a module that was put
    in the place that had this name.
    """
    forward = running.forward
    if forward is None or not forward.as_rehearsed or ids.shape[-1] < running.peers.size:
        return False
    if not forward.has_in_place(module, name):
        return False
    if torch.is_grad_enabled():
        models: list[nn.Module] = [] if isinstance(first, GradientCheckpointingLayer) else [*running.region.models]
        if any(getattr(model, "gradient_checkpointing", False) for model in models):
            return False
        if any(isinstance(one, CheckpointWrapper) for one in forward.model.modules()):
            return False
    return can_look_up(module, ids)


def head_hook(running: RegionState, name: str) -> Hook:
    """Give the head my span of hidden states that are whole before it, and keep them for a loss in tiles."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward, head = running.forward, running.region.head
        if forward is None or len(args) != 1 or kwargs or not forward.has_in_place(module, name):
            return None
        hidden, size = args[0], running.peers.size
        cuts = running.region.cut is not None and forward.as_rehearsed and not forward.cut
        if cuts and size <= hidden.shape[1] == forward.stays_sharded:
            forward.cut, span = hidden.shape[1], running.peers.span(hidden.shape[1])
            hidden = hidden[:, span.start : span.stop]
        length = forward.sharded(running.region)
        if length is not None and forward.held is None and isinstance(head, LMHead):
            _, tiles = forward.counts or running.counts(hidden.shape[0], length)
            if tiles > 1:
                forward.held = LMHeadInput(head, module, hidden, tiles, autocast_of_now(hidden.device))
                hidden = hidden[:, :0]
        return (hidden,), kwargs

    return before
