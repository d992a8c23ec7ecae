"""The two ends of the region: the embedding before the first layer, and the LM head behind the last."""

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers.modeling_layers import GradientCheckpointingLayer

from sp_attention.kernels.autocast import autocast_of_now
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput
from sp_attention.region.plan import Embedding
from sp_attention.region.sharded_embedding import can_look_up, looked_up
from sp_attention.region.state import Around, RegionState


def around_embedding(state: RegionState, embedding: Embedding, first: nn.Module) -> Around:
    """Let an embedding look up my span of the tokens, where `first`, the first layer, alone gets what it yields."""

    def around(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[Any, Any, Any]:
        ids = args[0] if len(args) == 1 and not kwargs else None
        if ids is None or not _looks_up_its_own(state, module, embedding.name, first, ids):
            yield None
            return None
        length, span = ids.shape[1], state.peers.span(ids.shape[1])
        output = yield (ids[:, span.start : span.stop],), {}
        if state.forward is None or output is None:
            return None
        state.forward.embedded = looked_up(output, length)
        return state.forward.embedded.whole

    return around


def _looks_up_its_own(state: RegionState, module: nn.Embedding, name: str, first: nn.Module, ids: Tensor) -> bool:
    """Whether only my span of the embeddings is looked up: if nobody but the first layer gets to see them.

    A checkpoint around the hooks of the first layer would, which does without gradients, and a module that was put
    in the place that had this name.
    """
    forward = state.forward
    if forward is None or not forward.as_rehearsed or ids not in state.context.scope.given:
        return False
    if forward.others.told:  # They may see what is given to the first layer.
        return False
    if ids.shape[-1] < state.peers.size or not forward.has_in_place(module, name):
        return False
    if torch.is_grad_enabled():
        by_model = not isinstance(first, GradientCheckpointingLayer)
        for one in forward.model.modules():
            if isinstance(one, CheckpointWrapper) or (
                by_model and getattr(one, "gradient_checkpointing", False) is True
            ):
                return False
    return can_look_up(module, ids)


def before_lm_head(state: RegionState, name: str) -> Callable[..., Any]:
    """Give the LM head my span of hidden states that are whole before it, and keep them for a loss in tiles."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward, lm_head = state.forward, state.plan.lm_head
        if forward is None or len(args) != 1 or kwargs or not forward.has_in_place(module, name):
            return None
        hidden, size = args[0], state.peers.size
        cuts = state.plan.cut_before is not None and forward.as_rehearsed and not forward.cut
        if cuts and size <= hidden.shape[1] == forward.stays_sharded:
            forward.cut, span = hidden.shape[1], state.peers.span(hidden.shape[1])
            hidden = hidden[:, span.start : span.stop]
        length = forward.sharded(state.plan)
        if length is not None and forward.lm_head_input is None and isinstance(lm_head, LMHead):
            _, tiles = forward.tile_counts or state.tile_counts(hidden.shape[0], length)
            if tiles > 1:
                forward.lm_head_input = LMHeadInput(lm_head, module, hidden, tiles, autocast_of_now(hidden.device))
                hidden = hidden[:, :0]
        return (hidden,), kwargs

    return before
