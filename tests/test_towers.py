"""Several models of transformers side by side in one module: all are enabled by one call, and say so."""

from typing import Any

import pytest
import torch
import transformers
from helpers import errors_of, too_large
from models import LLAMA, Tiny, batch_of
from torch import Tensor, nn

import sp_attention
from sp_attention.api import handle_of
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks

BERT = Tiny("BertModel", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})


class Recording(nn.Module):
    """An activation, which remembers of how many tokens it was given numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.length = inner, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.length = hidden.shape[-2]
        return self.inner(hidden)


class Towers(nn.Module):
    """A question and a text, and how alike they are."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.question, self.text = first, second

    def forward(self, ids: Tensor) -> Tensor:
        question = self.question(input_ids=ids[:, :9]).last_hidden_state.mean(1)
        text = self.text(input_ids=ids).last_hidden_state.mean(1)
        return (question * text).sum(-1).square().mean()


def towers() -> Towers:
    return Towers(BERT.build(), Tiny("LlamaModel").build())


def step(model: nn.Module) -> list[Tensor]:
    value = model(batch_of("plain", 33)["input_ids"])
    value.backward()
    return [value.detach()]


def enabled_together() -> dict[str, Any]:
    reference, model = towers(), towers()
    text, question = Recording(model.text.layers[0].mlp.act_fn), Recording(nn.GELU())
    model.text.layers[0].mlp.act_fn = text
    model.question.encoder.layer[0].intermediate.intermediate_act_fn = question
    handle = sp_attention.enable(model, backend="sdpa")
    errors = errors_of(reference, model, step)
    spans = [text.length, question.length]
    with handle.suspended(), torch.no_grad():
        alone = model(batch_of("plain", 33)["input_ids"]) - reference(batch_of("plain", 33)["input_ids"])
    lengths = [text.length, question.length]
    report = handle.report()
    assert handle_of(model) is handle
    handle.disable()
    assert handle_of(model) is None
    sp_attention.enable(model.text, backend="sdpa")  # nothing is left of the first time
    return {
        "errors": too_large({name: error for name, error in errors.items() if "key.bias" not in name}),
        "spans": spans,
        "alone": lengths,
        "value": alone.item(),
        "report": report,
    }


def test_all_models_of_a_module_are_enabled() -> None:
    for rank, found in enumerate(run_ranks(2, enabled_together)):
        assert found["errors"] == {}
        assert found["spans"] == [(17, 16)[rank], (5, 4)[rank]]
        assert found["alone"] == [33, 9]
        assert abs(found["value"]) < 1e-9
        assert "text, beside it: sp_attention: 2 processes = 1 group x 2 ranks" in found["report"]


def one_that_cannot() -> list[str]:
    """What is said of a model without a sequence beside another one, and of two of them."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    images = [transformers.ResNetModel(config).double() for _ in range(2)]
    handle = sp_attention.enable(Towers(images[0], Tiny("LlamaModel").build()), backend="sdpa")
    with pytest.raises(UnsupportedError) as refusal:
        sp_attention.enable(Towers(*images), backend="sdpa")
    shared = LLAMA.build()
    other = type(shared)(shared.config).double()
    with pytest.raises(ValueError, match="shares its configuration object") as error:
        sp_attention.enable(Towers(shared, other), backend="sdpa")
    assert handle_of(shared) is None
    return [handle.report(), str(refusal.value), str(error.value)]


def test_those_that_cannot_be_shared_are_left_alone_and_named() -> None:
    for report, refusal, _ in run_ranks(2, one_that_cannot):
        assert "question, beside it: left alone, each rank does all of it: ResNetModel" in report.replace("\n", " ")
        assert "ResNetModel" in refusal
