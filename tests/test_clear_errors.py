"""What an enabled model cannot do ends in an UnsupportedError, on every rank, that names the user's way out."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import LLAMA, Tiny, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.api import Handle
from sp_attention.errors import UnsupportedError, told
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations


def loss_of(model: PreTrainedModel, **weights: Tensor) -> Tensor:
    loss: Tensor = torch.func.functional_call(model, weights, (), batch_of("plain", 33)).loss
    return loss


def checkpointed_loss(model: PreTrainedModel) -> Tensor:
    checkpoint_activations(model, {"use_reentrant": False})
    return loss_of(model)


def backward_after_disable(model: PreTrainedModel, handle: Handle) -> None:
    loss = checkpointed_loss(model)
    handle.disable()
    loss.backward()


def backward_within_suspended(model: PreTrainedModel, handle: Handle) -> None:
    loss = checkpointed_loss(model)
    with handle.suspended():
        loss.backward()


def saved(model: PreTrainedModel, handle: Handle) -> None:
    torch.save(model, io.BytesIO())


def handle_saved(model: PreTrainedModel, handle: Handle) -> None:
    torch.save(handle, io.BytesIO())


def second_derivatives(model: PreTrainedModel, handle: Handle) -> None:
    grads = torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)
    torch.stack([grad.square().sum() for grad in grads]).sum().backward()


def torch_func(model: PreTrainedModel, handle: Handle) -> None:
    torch.func.grad(lambda weight: loss_of(model, **{"lm_head.weight": weight}))(model.lm_head.weight.detach())


CASES: dict[Callable[[PreTrainedModel, Handle], None], str] = {
    backward_after_disable: "call backward() before handle.disable()",
    backward_within_suspended: "not within handle.suspended()",
    saved: "save model.state_dict()",
    handle_saved: "save model.state_dict()",
    second_derivatives: "second derivatives (create_graph=True",
    torch_func: "torch.func (grad, vmap, jvp ...) of an enabled model is not covered",
}


def texts() -> dict[str, str]:
    found = {}
    for case in CASES:
        model = LLAMA.build()
        handle = sp_attention.enable(model, backend="sdpa")
        with pytest.raises(UnsupportedError) as refusal:
            case(model, handle)
        found[case.__name__] = str(refusal.value)
    return found


@pytest.mark.filterwarnings("ignore")
def test_what_an_enabled_model_cannot_do_is_said() -> None:
    for found in run_ranks(2, texts):
        for case, part in CASES.items():
            assert part in found[case.__name__]


def still_done() -> list[Any]:
    """Whether gradients with a graph are those without, and what a model gives that is saved once it is disabled."""
    model = LLAMA.build()
    with sp_attention.enable(model, backend="sdpa"):
        weights = list(model.parameters())
        pairs = zip(
            torch.autograd.grad(loss_of(model), weights),
            torch.autograd.grad(loss_of(model), weights, create_graph=True),
            strict=True,
        )
        alike = all(torch.allclose(one, other) for one, other in pairs)
        copied = copy.deepcopy(model)
        assert torch.equal(loss_of(copied), loss_of(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return [alike, torch.equal(loss_of(loaded), loss_of(LLAMA.build()))]


def test_graphs_of_gradients_and_saving_a_disabled_model_still_work() -> None:
    assert run_ranks(2, still_done) == [[True, True]] * 2


class Unknown(nn.Module):
    """An LM head that ends in an error that is a module, as of a table of modules that it is not in."""

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[1] == 0:
            raise KeyError(self)
        return hidden[..., :97]

    def __repr__(self) -> str:
        return "Unknown(\n" + "  (0): Linear(in_features=48, out_features=48, bias=True)\n" * 40 + ")"


def report_of_unknown() -> str:
    model = Tiny("LlamaForCausalLM", {"hidden_size": 96}).build()
    model.lm_head = nn.Sequential(nn.Linear(96, 97, bias=False).double(), Unknown())
    return sp_attention.enable(model, backend="sdpa").report()


def test_errors_of_others_are_told_in_one_line() -> None:
    for report in run_ranks(2, report_of_unknown):
        assert "KeyError: Unknown(" in report
        assert max(map(len, report.splitlines())) < 450
    assert told(ValueError("one\n  two")) == "ValueError: one two"
    assert told(ValueError("x" * 400)) == "ValueError: " + "x" * 288 + " ..."
