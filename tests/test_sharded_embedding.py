"""Embeddings: each rank looks up its own tokens, and nothing of a training step is as large as the whole sequence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Selected, errors_of, loss_step, run_once
from models import LLAMA, Tiny
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations


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
            checkpoint_activations(model, {"use_reentrant": False})
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


def scale_by_a_hook(model: PreTrainedModel) -> None:
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 1.5)


def scale_by_a_module(model: PreTrainedModel) -> None:
    model.set_input_embeddings(Scaled(model.get_input_embeddings()))


def checkpoint(model: PreTrainedModel) -> None:
    checkpoint_activations(model, {"use_reentrant": True})


def wrap(model: PreTrainedModel) -> None:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda layer: checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT),
        check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
    )


# What is done to a model after enable().
CHANGES: dict[str, Callable[[PreTrainedModel], None]] = {
    "none": lambda model: None,
    "a hook that scales": scale_by_a_hook,
    "a module in its place": scale_by_a_module,
    "re-entrant": checkpoint,
    "wrapped re-entrant": wrap,
}


def changed(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Errors of loss and gradients."""
    found = {}
    for name in names:
        reference, model = LLAMA.build(), LLAMA.build()
        handle = sp_attention.enable(model, backend="sdpa")
        assert "embed_tokens: looks up this rank's tokens" in handle.report()
        CHANGES[name](model)
        if "re-entrant" not in name:  # In one process that fills the model's cache twice.
            CHANGES[name](reference)
        found[name] = errors_of(reference, model, lambda each: loss_step(each, "plain", 31))
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_else_sees_the_embeddings_sees_all_of_them(change: str, selected: Selected) -> None:
    for found in run_once(3, changed, selected("change")):
        assert max(found[change].values()) < 1e-5, found[change]


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
