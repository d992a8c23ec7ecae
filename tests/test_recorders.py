"""What transformers records inside of models when its configuration says so, and accelerate's hooks after enable()."""

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import TWO_AND_THREE, errors_of, loss_step, too_large
from models import LLAMA, MODELS, Tiny
from torch import nn

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.kernels.request import Mask
from sp_attention.launch import run_ranks
from sp_attention.region.masks import Described

MIXTRAL = MODELS["mixtral"].settings
RECORDED: dict[str, Tiny] = {
    "mixtral": Tiny("MixtralForCausalLM", {**MIXTRAL, "output_router_logits": True, "router_aux_loss_coef": 0.5}),
    "mixtral, states": Tiny("MixtralForCausalLM", {**MIXTRAL, "output_hidden_states": True}),
    "qwen3-moe": Tiny(
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "experts_implementation": "eager"}
        | {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
}


def switched_on() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, tiny in RECORDED.items():
        reference, model = tiny.build(), tiny.build()
        sp_attention.enable(model, backend="sdpa")
        found[name] = too_large(errors_of(reference, model, loss_step))
        model.eval()
        outputs = [each(input_ids=torch.arange(3, 36)[None]) for each in (reference.eval(), model)]
        for one, other in zip(*(output.get("router_logits") or () for output in outputs), strict=True):
            torch.testing.assert_close(one, other)
    return found


@pytest.mark.parametrize("ranks", TWO_AND_THREE)
def test_what_the_configuration_switches_on_is_recorded_of_forwards_and_not_of_the_proof(ranks: int) -> None:
    for found in run_ranks(ranks, switched_on):
        assert found == {name: {} for name in RECORDED}


def aligned() -> dict[str, float]:
    reference, model = LLAMA.build(), LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return too_large(errors_of(reference, model, loss_step))


def test_hooks_of_accelerate_move_what_layers_are_given() -> None:
    assert run_ranks(2, aligned) == [{}, {}]


def test_masks_stay_on_their_device_and_are_no_tensors() -> None:
    described = Described(Mask(2, 5, 5, torch.device("cpu"), causal=True))
    assert described.to("cpu") is described.to(torch.device("cpu"), non_blocking=True) is described
    assert repr(described) == str(described) == "Described[2, 1, 5, 5]"
    uses: list[Any] = [
        lambda: described[:, :, :, :3],
        lambda: torch.zeros(5, 5) + described,
        lambda: nn.functional.scaled_dot_product_attention(*[torch.ones(2, 1, 5, 4)] * 3, attn_mask=described),
    ]
    for use in uses:
        with pytest.raises(UnsupportedError, match="is used as if it were a tensor"):
            use()
    with pytest.raises(UnsupportedError, match="spread over several devices"):
        described.to("cuda:1")
