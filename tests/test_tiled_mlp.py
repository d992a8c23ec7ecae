"""MLPs and norms some tokens at a time: the numbers of one process, with less memory."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from helpers import TWO_AND_THREE, Selected, fsdp, run_once, slopes, spy
from models import LLAMA, MODELS, Tiny, batch_of
from tiled import CASES, Case, error_of, ids_of
from torch import Tensor, nn

import sp_attention
from sp_attention.launch import run_ranks

QWEN3_MOE = Tiny(
    "Qwen3MoeForCausalLM",
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",
        "mlp_only_layers": [0],
        "moe_intermediate_size": 32,
    },
    1e-3,
)


def classified(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(input_ids=batch["input_ids"], labels=torch.tensor([0, 1])).loss


def hooked_inside(model: nn.Module) -> nn.Module:
    """With hooks of the user's on gradients of weights of an MLP and of a norm."""
    for weight in (model.model.layers[1].mlp.up_proj.weight, model.model.layers[1].input_layernorm.weight):
        weight.register_hook(lambda grad: 3 * grad)
    return model


def frozen_inside(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.requires_grad_(False)
    return model


SHARED = (
    "padded",
    "two forwards",
    "only the head",
    "checkpointed",
    "checkpointed, re-entrant",
    "ddp, static graph",
    "fsdp2",
)
MLPS = {name: CASES[name] for name in (*SHARED, "fsdp2, checkpointed")} | {
    "hooks on weights": Case(prepared=hooked_inside),
    "frozen MLP": Case(prepared=frozen_inside),
    "an MLP without a gate": Case(Tiny("PhiForCausalLM")),
    "dense and experts": Case(QWEN3_MOE),
    "fsdp2, MLP apart": Case(wrapped=partial(fsdp, apart="mlp")),
    "labels of sequences": Case(Tiny("LlamaForSequenceClassification"), computed=classified),
}


def is_in_tiles(part: str, report: str) -> bool:
    return re.search(rf"\b{part}(, [\w., ]+)?: position-wise, 4 tokens at a time in training", report) is not None


def in_tiles(names: tuple[str, ...]) -> dict[str, tuple[float, int, str]]:
    return {name: error_of(MLPS[name], mlp_tile=4, measured=("act_fn", "activation_fn")) for name in names}


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
@pytest.mark.parametrize("name", MLPS, ids=ids_of(MLPS))
def test_parts_in_tiles_give_the_gradients_of_one_process(name: str, ranks: int, selected: Selected) -> None:
    for found in run_once(ranks, in_tiles, selected("name", ranks=ranks), timeout=300):
        error, tokens, report = found[name]
        assert error < 1
        assert tokens <= 4
        assert is_in_tiles("mlp", report)
        assert is_in_tiles(r"\w*layernorm", report)
        assert ("all tokens at a time, since transformers records" in report) == (name == "dense and experts")


def error_of_views() -> tuple[float, int, str]:
    return error_of(Case(MODELS["gpt2"], "left-padded"), mlp_tile=4, measured=".act")


def test_an_mlp_that_makes_views_of_rows_is_given_contiguous_tiles() -> None:
    for error, tokens, report in run_ranks(2, error_of_views):
        assert error < 1
        assert tokens <= 4
        assert is_in_tiles("ln_2", report)


def dtypes_of_tiles() -> set[torch.dtype]:
    """What an MLP computes in within autocast, and in the backward that comes after it."""
    model, dtypes = LLAMA.build(torch.float32), set[torch.dtype]()
    sp_attention.enable(model, backend="sdpa", mlp_tile=4)
    act_fn = model.model.layers[0].mlp.act_fn
    act_fn.register_forward_pre_hook(spy(lambda module, args: dtypes.add(args[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_of("plain", 33)).loss
    before = len(dtypes)
    loss.backward()
    assert before == 1
    return dtypes


def test_tiles_are_computed_again_as_they_were_in_autocast() -> None:
    assert run_ranks(2, dtypes_of_tiles) == [{torch.bfloat16}] * 2


def gradients_with_dropout() -> tuple[float, float]:
    """How the loss changes along a direction of the weights of MLPs that draw: by its gradient, and by two losses."""
    model = Tiny("GPT2LMHeadModel", {"resid_pdrop": 0.3}).build()
    handle = sp_attention.enable(model, backend="sdpa", mlp_tile=4)
    assert "mlp: position-wise, 4 tokens at a time in training" in handle.report()
    return slopes(model, [parameter for name, parameter in model.named_parameters() if ".mlp." in name])


def test_tiles_that_draw_random_numbers_draw_the_same_again_in_backward() -> None:
    for by_gradient, by_losses in run_ranks(2, gradients_with_dropout):
        assert by_gradient == pytest.approx(by_losses, rel=1e-2)


def numbers_saved(**options: Any) -> int:
    """How many numbers a forward keeps for backward, but for parameters."""
    model, saved = LLAMA.build(), dict[int, int]()
    sp_attention.enable(model, backend="sdpa", **options)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch_of("plain", 33)).loss
    assert loss.requires_grad
    return sum(saved.values())


def saved_by_each() -> list[int]:
    return [numbers_saved(loss_tile=None, mlp_tile=tile) for tile in (None, 4)]


def test_less_is_kept_of_parts_in_tiles() -> None:
    for rank, (at_once, in_tiles) in enumerate(run_ranks(2, saved_by_each)):
        # In each of two layers, of a token, 8 x 64 numbers that an MLP computes, and 2 x 48 of each of its two norms.
        assert at_once - in_tiles >= (17 - rank) * 2 * (8 * 64 + 2 * 2 * 48)
