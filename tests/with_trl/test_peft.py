"""PEFT: adapters on every part of a model, put on before and after `enable`, trained, saved, merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Selected, relative_error, run_once
from models import LLAMA, MODELS, Tiny, batch_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.api import handle_of
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations

TIED = MODELS["llama-tied"]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Model, adapters, and how it is checkpointed.
WAYS: dict[str, tuple[Tiny, dict[str, Any], dict[str, Any] | None]] = {
    "attention and MLP": (LLAMA, {"target_modules": LAYERS}, None),
    "embeddings and head": (LLAMA, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None),
    "whole embeddings and head": (
        LLAMA,
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        None,
    ),
    "tied embeddings": (TIED, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, None),
    "some tokens": (LLAMA, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]}, None),
    "dora": (LLAMA, {"target_modules": LAYERS, "use_dora": True}, None),
    "window, key/value heads": (MODELS["mistral-window5"], {"target_modules": ["k_proj", "v_proj"]}, None),
    "checkpointed": (LLAMA, {"target_modules": LAYERS}, {"use_reentrant": False}),
    "checkpointed, re-entrant": (LLAMA, {"target_modules": LAYERS}, {"use_reentrant": True}),
}


def adapted(model: PreTrainedModel, adapters: dict[str, Any], checkpointed: dict[str, Any] | None) -> PeftModel:
    torch.manual_seed(1)
    # Random weights: with those that PEFT begins with, half of the gradients are zero.
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **adapters))
    if checkpointed is not None:
        checkpoint_activations(made, checkpointed)
        made.enable_input_require_grads()
    return made.train()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: nn.Module) -> list[dict[str, Tensor]]:
    """Three steps: the gradients of each, and what came of it."""
    found = []
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for kind, length in (("left-padded", 33), ("packed", 20), ("plain", 17)):
        loss = model(**batch_of(kind, length)).loss
        loss.backward()
        sp_attention.average_gradients(model)
        gradients = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
        found.append(gradients | {"loss": loss.detach()})
        optimizer.step()
        optimizer.zero_grad()
    return [*found, {name: parameter.detach().clone() for name, parameter in trainable(model).items()}]


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(batch_of("plain", 33)["input_ids"]).logits


def run(folder: Path, ways: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    """For every way: relative errors of gradients and weights, what was trained, and the adapter as it was saved."""
    found = {}
    for way in ways:
        tiny, adapters, checkpointed = WAYS[way]
        for order in ("enabled first", "adapted first"):
            reference = adapted(tiny.build(), adapters, checkpointed)
            model = tiny.build()
            if order == "enabled first":
                sp_attention.enable(model, backend="sdpa")
            model = adapted(model, adapters, checkpointed)
            if order == "adapted first":
                sp_attention.enable(model, backend="sdpa")
            pairs = list(zip(train(model), train(reference), strict=True))
            errors = {
                f"{number}, {name}": relative_error(mine[name], theirs[name])
                for number, (mine, theirs) in enumerate(pairs)
                for name in theirs
            }
            saved = folder / way / order / f"{handle_of(model).peers.rank}"
            model.save_pretrained(saved)
            logits = logits_of(model)
            errors["loaded"] = relative_error(logits_of(PeftModel.from_pretrained(tiny.build(), saved)), logits)
            merged, expected = model.merge_and_unload(), logits_of(reference.merge_and_unload())
            errors["merged"] = relative_error(logits_of(merged), expected)
            handle_of(merged).disable()
            errors["merged, disabled"] = relative_error(logits_of(merged), expected)
            found[way, order] = errors, pairs[-1][0]
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peft")


@pytest.mark.parametrize("order", ["enabled first", "adapted first"])
@pytest.mark.parametrize("way", WAYS, ids=[f"{tiny.name}, {way}" for way, (tiny, *_) in WAYS.items()])
def test_adapters_are_trained_saved_and_merged_as_in_one_process(
    folder: Path, way: str, order: str, selected: Selected
) -> None:
    first, second = (found[way, order] for found in run_once(2, run, folder, selected("way"), timeout=240))
    for errors, _ in (first, second):
        # transformers gives losses in float32.
        bounds = {name: 5e-7 if name.endswith(", loss") else 1e-9 for name in errors}
        assert {name: error for name, error in errors.items() if not error < bounds[name]} == {}
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def with_dropout() -> str:
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    model = adapted(model, {"target_modules": LAYERS, "lora_dropout": 0.1}, None)
    with pytest.raises(sp_attention.UnsupportedError) as refusal:
        model(**batch_of("plain", 33))
    return str(refusal.value)


def test_dropout_of_adapters_must_be_there_before_enable() -> None:
    first, second = run_ranks(2, with_dropout)
    assert first == second
    assert first.endswith("switch dropout on before enable()")
