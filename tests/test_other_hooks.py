"""Hooks of others on the LM head see and edit all logits, whether they come before enable() or after it."""

from typing import Any

import pytest
import torch.distributed as dist
from helpers import errors_of, loss_step, too_large
from models import LLAMA
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.errors import BatchError
from sp_attention.launch import run_ranks

SEEN: list[tuple[int, ...]] = []


def centre(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
    """No function of each token alone."""
    SEEN.append(tuple(logits.shape))
    return logits - logits.mean(1, keepdim=True)


def hooked(when: str) -> PreTrainedModel:
    model = LLAMA.build()
    if when == "after":
        sp_attention.enable(model, backend="sdpa", loss_tile=4)
    model.lm_head.register_forward_hook(centre)
    if when == "before":
        report = sp_attention.enable(model, backend="sdpa").report()
        assert "logits are whole: hooks that are not sp_attention's see them, on the LM head" in report
    return model


def seen_by_hooks() -> tuple[list[dict[str, float]], set[tuple[int, ...]], str]:
    errors = []
    for when in ("before", "after"):
        model = hooked(when)
        SEEN.clear()
        errors.append(too_large(errors_of(hooked("never"), model, loss_step)))
    shapes = set(SEEN)
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    if dist.get_rank() == 1:
        model.lm_head.register_forward_hook(centre)
    with pytest.raises(BatchError) as error:
        loss_step(model)
    return errors, shapes, str(error.value)


def test_hooks_on_the_head_see_and_edit_all_logits() -> None:
    for errors, shapes, text in run_ranks(2, seen_by_hooks):
        assert errors == [{}, {}]
        assert shapes == {(2, 33, 97)}
        assert "(hooks and modules of others) differs on rank 1" in text
