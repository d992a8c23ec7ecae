"""`model.forward(...)` called as a method, and forwards that others put in place of a model's own."""

import copy
import inspect
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers import TWO_AND_THREE, as_launched, largest_error, loss_step, run_once
from models import LLAMA, MODELS, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks

LENGTH = 33


def method_step(model: PreTrainedModel) -> list[Tensor]:
    """As GRPO helpers do it."""
    loss = model.forward(**batch_of("left-padded", LENGTH)).loss
    loss.backward()
    return [loss.detach()]


def inner_step(model: PreTrainedModel) -> list[Tensor]:
    """As sentence-transformers does it, with the model without its head; and a pooled loss."""
    batch = batch_of("right-padded", LENGTH)
    del batch["labels"]
    hidden = model.model.forward(**batch).last_hidden_state
    (hidden[:, 7] * hidden.mean(1)).sum().backward()
    return [hidden.detach()]


class Pooling(nn.Module):
    """A model in one that calls its forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inside = model

    def forward(self, **batch: Any) -> Any:
        return self.inside.forward(**batch)


def errors() -> dict[str, float]:
    found = {}
    for name in ("llama-5q1kv", "gpt2"):
        tiny = MODELS[name]
        reference, model = tiny.build(), tiny.build()
        sp_attention.enable(model, backend="sdpa", loss_tile=4)
        found[name] = largest_error(reference, model, method_step)
        assert not isinstance(model.forward(**batch_of("plain", LENGTH)).logits, Tensor)
    reference, model = LLAMA.build(), LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa")
    found["inner"] = largest_error(reference, model, inner_step)
    found["then by hooks"] = largest_error(reference, model, loss_step)
    found["wrapped"] = largest_error(Pooling(reference), Pooling(model), loss_step)
    reference.zero_grad()  # A copy has no gradients.
    found["a copy"] = largest_error(reference, copy.deepcopy(model), method_step)
    with pytest.raises(IndexError, match="out of bounds"):
        model.forward(batch_of("plain", LENGTH)["input_ids"], labels=torch.full((2, LENGTH), 10**6))
    model.zero_grad()
    reference.zero_grad()
    found["after an error"] = largest_error(reference, model, method_step)
    with handle.suspended():
        model.eval()
        assert model.forward(batch_of("plain", LENGTH)["input_ids"]).logits.shape[1] == LENGTH
        assert "forward" not in vars(model)
    model.train()
    handle.disable()
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.model)
    return found


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_a_forward_called_as_a_method_is_that_of_one_process(ranks: int) -> None:
    for found in run_ranks(ranks, errors, timeout=120):
        assert max(found.values()) < 1e-5, found


def other_batches() -> str:
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    ids = batch_of("plain", LENGTH)["input_ids"].clone()
    ids[0, 3] = torch.distributed.get_rank()
    with pytest.raises(sp_attention.errors.BatchError) as refusal:
        model.forward(ids)
    return str(refusal.value)


def test_other_batches_are_refused_there_too() -> None:
    first, second = run_ranks(2, other_batches)
    assert first == second
    assert "input_ids differs on rank 1" in first


def signatures() -> bool:
    model = LLAMA.build()
    before, inner = inspect.signature(model.forward), inspect.signature(model.model.forward)
    sp_attention.enable(model, backend="sdpa")
    return before == inspect.signature(model.forward) and inner == inspect.signature(model.model.forward)


def test_signatures_stay() -> None:
    assert all(run_ranks(2, signatures))


def fused(self: Any, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
    """As Liger's: the loss of hidden states, of any length."""
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
    if labels is None:
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
    logits = self.lm_head(hidden[:, :-1])
    targets = labels[:, 1 : hidden.shape[1]]
    return CausalLMOutputWithPast(loss=F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), logits=logits)


class Doubled(ModelHook):
    """As accelerate puts hooks around forwards."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output["loss"] = 2 * output["loss"]
        return output


def replaced() -> dict[str, float]:
    found = {}

    def errors(name: str, put: Any, step: Any = loss_step) -> PreTrainedModel:
        reference, model = LLAMA.build(), LLAMA.build()
        sp_attention.enable(model, backend="sdpa", loss_tile=4)
        for one in (reference, model):
            put(one)
        found[name] = largest_error(reference, model, step)
        return model

    def fuse(model: PreTrainedModel) -> None:
        model.forward = MethodType(fused, model)

    model = errors("fused", fuse)
    assert vars(model)["_sp_attention_handle"].report().endswith("its forward is test_direct_call.fused now")
    model = errors("accelerate", lambda model: add_hook_to_module(model, Doubled()))
    # It leads to ours, so the logits stay sharded.
    assert not isinstance(model(**batch_of("plain", LENGTH)).logits, Tensor)
    errors("accelerate, as a method", lambda model: add_hook_to_module(model, Doubled()), method_step)
    reference, model = LLAMA.build(), LLAMA.build()
    for one in (reference, model):
        fuse(one)
    handle = sp_attention.enable(model, backend="sdpa")
    found["before enable"] = largest_error(reference, model, loss_step)
    found["before enable, as a method"] = largest_error(reference, model, method_step)
    handle.disable()
    assert vars(model)["forward"].__func__ is fused
    return found


def test_a_forward_that_was_replaced_is_exact() -> None:
    for found in run_ranks(2, replaced):
        assert max(found.values()) < 1e-5, found


def fused_and_called_past_us() -> str:
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    model.model.forward = MethodType(
        lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), model.model
    )
    with pytest.raises(UnsupportedError) as refusal:
        model.model.forward(batch_of("plain", LENGTH)["input_ids"])
    return str(refusal.value)


def test_a_forward_that_was_replaced_and_is_called_past_the_hooks_is_refused() -> None:
    first, second = run_ranks(2, fused_and_called_past_us)
    assert first == second
    assert "model.layers.0 runs outside of a forward of its model" in first


def prepared() -> float:
    """accelerate's autocast wraps the forward after enable()."""
    as_launched()
    reference, model = LLAMA.build().float(), LLAMA.build().float()
    sp_attention.enable(model, backend="sdpa")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    plain = accelerator.prepare_model(reference, device_placement=False, evaluation_mode=True)
    ours = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
    return largest_error(plain, ours, method_step)


def test_accelerate_wraps_our_forward() -> None:
    assert max(run_once(2, prepared)) < 0.05
