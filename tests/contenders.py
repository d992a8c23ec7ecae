"""A training step of what the benchmarks compare, against one process."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sp_attention
from sp_attention.cli.benchmarks import training
from sp_attention.launch import run_ranks


def gradients(name: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of the first forward of a contender, in a small model, and the gradients of the whole sequence."""
    torch.manual_seed(0)
    sizes = training.MODEL | {"vocab_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    ids = torch.randint(128, (1, 64))
    loss = training.LOSSES[name](model, ids)()
    sp_attention.average_gradients(model)
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def require_step_of_one_process(name: str) -> None:
    ((loss, expected),) = run_ranks(1, gradients, training.ALONE)
    for other, got in run_ranks(2, gradients, name, timeout=300):
        assert other == pytest.approx(loss, rel=1e-5)
        for parameter, grad in expected.items():
            torch.testing.assert_close(got[parameter], grad, rtol=0, atol=1e-5 * grad.abs().max().item())
