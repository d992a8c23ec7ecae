"""Embeddings: each rank looks up its own tokens, and nothing of a training step is as large as the whole sequence."""

from typing import Any

import pytest
import torch
from models import MODELS, Tiny, batch_of
from test_parity import relative_error
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sp_attention
from sp_attention.launch import run_ranks

LLAMA = MODELS["llama-6q3kv"]


class Largest(TorchDispatchMode):
    """Notes the largest memory, in numbers, of a float tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.operator = 0, ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
                if numbers > self.numbers:
                    self.numbers, self.operator = numbers, str(function)
        return result


def largest_of_a_step() -> list[tuple[int, str]]:
    found = []
    # Small tables, and few heads of each rank: what is of the whole sequence shows in the width of the model.
    model = Tiny("LlamaForCausalLM", {"num_key_value_heads": 1, "num_hidden_layers": 3}).build()
    sp_attention.enable(model, backend="sdpa")
    ids = torch.randint(3, 97, (1, 512), generator=torch.Generator().manual_seed(0))
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with Largest() as largest:
            model(input_ids=ids, labels=ids).loss.backward()
        found.append((largest.numbers, largest.operator))
    return found


def test_no_float_tensor_of_a_training_step_is_as_large_as_the_hidden_states_of_the_sequence() -> None:
    for numbers, operator in run_ranks(3, largest_of_a_step)[0]:
        assert numbers < 512 * 48, operator


class Scaled(nn.Module):
    """Embeddings and more, as an adapter has them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) * 1.5


def errors(change: str, batch: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative errors of loss and gradients of a model that was changed after `enable`."""
    reference, model = LLAMA.build(), LLAMA.build()
    loss = reference(**batch).loss
    loss.backward()
    handle = sp_attention.enable(model, backend="sdpa")
    assert "embed_tokens: looks up this rank's tokens" in handle.report()
    if change == "a hook that scales":
        for one in (reference, model):
            one.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1.5)
        reference.zero_grad()
        loss = reference(**batch).loss
        loss.backward()
    if change == "a module in its place":
        model.set_input_embeddings(Scaled(model.get_input_embeddings()))
        reference.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1.5)
        reference.zero_grad()
        loss = reference(**batch).loss
        loss.backward()
    if change == "re-entrant":
        model.activation_checkpointing_enable({"use_reentrant": True})
    if change == "wrapped re-entrant":
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda layer: checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT),
            check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
        )
    ours = model(**batch).loss
    ours.backward()
    sp_attention.average_gradients(model)
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    within = ("_checkpoint_wrapped_module.", "base.")
    mine = {name.replace(within[0], "").replace(within[1], ""): one.grad for name, one in model.named_parameters()}
    assert mine.keys() == theirs.keys()
    return {"loss": relative_error(ours, loss)} | {name: relative_error(mine[name], theirs[name]) for name in theirs}


CHANGES = ["none", "a hook that scales", "a module in its place", "re-entrant", "wrapped re-entrant"]


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_else_sees_the_embeddings_sees_all_of_them(change: str) -> None:
    for found in run_ranks(3, errors, change, batch_of("plain", 31)):
        assert max(found.values()) < 1e-5, found


def no_such_token() -> str:
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    ids = torch.full((1, 12), 5)
    ids[0, -1] = 97  # In the span of the last rank.
    with pytest.raises(IndexError) as error:
        model(input_ids=ids)
    return str(error.value)


def test_a_token_that_is_in_no_table_is_an_error_on_every_rank() -> None:
    assert run_ranks(2, no_such_token) == ["index out of range in self"] * 2
