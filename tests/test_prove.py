"""What is proven is training, with labels: what models do there alone is exact on ranks, or gathered until it is."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from helpers import be_quiet, errors_of, too_large
from models import COMMON, LLAMA, Tiny, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.launch import run_ranks


class Inject(torch.autograd.Function):
    """The identity, that adds a loss in backward, as DeepSeek's own code does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


class Experts(nn.Module):
    """Two experts, and how evenly tokens go to them: a loss that is kept, injected in training, or neither.

    drops: a chance to drop numbers, so small that none is.
    """

    def __init__(self, mlp: nn.Module, injects: bool, drops: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.mlp, self.router = mlp, nn.Linear(48, 2, dtype=torch.float64)
        self.injects, self.drop = injects, nn.Dropout(1e-12 if drops else 0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        share = self.router(hidden).softmax(-1)
        taken = nn.functional.one_hot(share.argmax(-1), 2).to(hidden.dtype)
        self.balance = 20 * (taken.flatten(0, 1).mean(0) * share.flatten(0, 1).mean(0)).sum()
        if self.injects and self.training:
            hidden = Inject.apply(hidden, self.balance)
        return self.drop(self.mlp(hidden) * (taken * share)[..., :1] + self.mlp(-hidden) * (taken * share)[..., 1:])


class Balanced(transformers.LlamaForCausalLM):
    """Adds what its layers keep to its loss, where there are labels."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        output = super().forward(input_ids, attention_mask, position_ids, labels=labels, use_cache=False)
        if labels is not None:
            output["loss"] = output["loss"] + sum(layer.mlp.balance for layer in self.model.layers)
        return output


class OverTokens(nn.Module):
    """A batch normalisation of [B, S, E], and dropout beside it."""

    def __init__(self, drops: bool) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(48, dtype=torch.float64), nn.Dropout(1e-12 if drops else 0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.drop(self.norm(hidden.flatten(0, 1)).view_as(hidden))


def keeping(injects: bool, drops: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    cls = transformers.LlamaForCausalLM if injects else Balanced
    model = cls(transformers.LlamaConfig(**COMMON)).double().train()
    for layer in model.model.layers:
        layer.mlp = Experts(layer.mlp, injects, drops)
    return model


def normalising(drops: bool) -> PreTrainedModel:
    model = LLAMA.build()
    model.model.layers[1].post_attention_layernorm = OverTokens(drops)
    return model


BUILT: dict[str, Callable[[], PreTrainedModel]] = {
    "kept and added with labels": lambda: keeping(injects=False, drops=False),
    "kept beside dropout": lambda: keeping(injects=False, drops=True),
    "injected in training": lambda: keeping(injects=True, drops=False),
    "injected beside dropout": lambda: keeping(injects=True, drops=True),
    "batch normalisation": lambda: normalising(drops=False),
    "batch normalisation beside dropout": lambda: normalising(drops=True),
}


def found() -> dict[str, tuple[dict[str, float], str]]:
    """Errors of a step with labels, by what models do in training only, and what enable() reports."""
    be_quiet()
    results = {}
    for name, build in BUILT.items():
        reference, model = build(), build()
        report = sp_attention.enable(model, backend="sdpa").report()

        def step(one: PreTrainedModel) -> list[Tensor]:
            # Every token and every row has a loss.
            loss = one(**batch_of("plain", 33)).loss
            loss.backward()
            return [loss.detach()]

        results[name] = errors_of(reference, model, step), report
    return results


def test_what_is_done_in_training_only_is_exact() -> None:
    for results in run_ranks(2, found, timeout=250):
        for name, (errors, report) in results.items():
            assert not too_large(errors), (name, report)
            # Attention, and with it most of the memory, is shared out all the same.
            assert "head-parallel" in report, (name, report)


CLASSIFIERS = {
    "of a text": ("LlamaForSequenceClassification", {"num_labels": 3}),
    "of several labels": (
        "LlamaForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "a number": ("LlamaForSequenceClassification", {"num_labels": 1}),
    "of tokens": ("LlamaForTokenClassification", {"num_labels": 3}),
    "answers": ("LlamaForQuestionAnswering", {}),
}


def labelled() -> dict[str, list[str]]:
    """With what labels enable() compared heads."""
    be_quiet()
    given: dict[str, list[str]] = {}
    for name, (cls, settings) in CLASSIFIERS.items():
        model = Tiny(cls, settings).build()
        seen: set[str] = set()

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], seen: set[str] = seen) -> None:
            for key in ("labels", "start_positions"):
                if kwargs.get(key) is not None and module.training and torch.is_grad_enabled():
                    seen.add(f"{key} {list(kwargs[key].shape)} {kwargs[key].dtype}")

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        sp_attention.enable(model, backend="sdpa")
        handle.remove()
        given[name] = sorted(seen)
    return given


def test_heads_are_compared_with_labels_of_their_own() -> None:
    first, second = run_ranks(2, labelled, timeout=200)
    assert first == second
    assert first == {
        "of a text": ["labels [2] torch.int64"],
        "of several labels": ["labels [2, 3] torch.float64"],
        "a number": ["labels [2, 1] torch.float64"],
        "of tokens": ["labels [2, 5] torch.int64"],
        "answers": ["start_positions [2] torch.int64"],
    }
