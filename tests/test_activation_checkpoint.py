"""Layers that are computed again in backward, each in the pass that it was of, which it finds by its mask."""

from typing import Any

import pytest
import torch
from helpers import Step, hidden_states_step, largest_error, loss_step, relative_error, too_large, two_forwards_step
from models import MODELS, Tiny
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.masking_utils import create_causal_mask

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations

LENGTH = 13
DROPOUT = Tiny("LlamaForCausalLM", {"attention_dropout": 0.2})


def trained(wraps: bool, steps: str) -> list[Tensor]:
    """All gradients of a Llama with dropout after steps whose forwards share one mask object.

    steps: "one after the other", or "both before backward".
    """
    model = DROPOUT.build()
    sp_attention.enable(model, backend="sdpa")
    if wraps:
        layers = tuple(model.model.layers)
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: module in layers
        )
    ids = torch.randint(1, 30, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = mask_of(model, ids)
    torch.manual_seed(5)
    if steps == "one after the other":
        for _ in range(2):
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    else:
        (sum(model(input_ids=ids, attention_mask=mask, labels=ids).loss for _ in range(2))).backward()
    return [parameter.grad for parameter in model.parameters()]


def mask_of(model: nn.Module, ids: Tensor) -> Any:
    """What transformers makes once a forward; the user may make it once for all."""
    embeds = model.get_input_embeddings()(ids)
    return create_causal_mask(model.config, embeds, None, past_key_values=None, position_ids=None)


def differences(steps: str) -> float:
    alone, wrapped = (trained(wraps, steps) for wraps in (False, True))
    return max(relative_error(other, one) for one, other in zip(alone, wrapped, strict=True))


def test_a_mask_that_serves_step_after_step_is_run_again_with_the_draws_of_its_own() -> None:
    for difference in run_ranks(2, differences, "one after the other", timeout=120):
        assert difference < 1e-9


def refused() -> str:
    with pytest.raises(UnsupportedError) as caught:
        trained(True, "both before backward")
    return str(caught.value)


def test_a_mask_that_serves_two_forwards_before_a_backward_is_refused_where_they_draw_other_numbers() -> None:
    for text in run_ranks(2, refused, timeout=120):
        assert "its mask was given to several forwards that drew other random numbers" in text


STEPS: dict[str, Step] = {
    "one forward": loss_step,
    "two forwards": two_forwards_step,
    "hidden states": hidden_states_step,
}


def run_checkpointed(reentrant: bool) -> dict[str, float]:
    errors = {}
    for name, step in STEPS.items():
        models = MODELS["mistral-window5"].build(), MODELS["mistral-window5"].build()
        for model in models:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        sp_attention.enable(models[1], backend="sdpa")
        errors[name] = largest_error(*models, step)
    return errors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False], ids=["mistral-reentrant", "mistral-not-reentrant"])
def test_layers_that_are_recomputed_in_backward_find_their_own_forward(reentrant: bool) -> None:
    for errors in run_ranks(2, run_checkpointed, reentrant):
        assert not too_large(errors)
