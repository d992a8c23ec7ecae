"""`average_gradients`: the mean over ranks, and its edges."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from sp_attention import average_gradients
from sp_attention.distributed import gradients
from sp_attention.launch import run_ranks


def means(bucket: int) -> list[object]:
    gradients.BUCKET = bucket
    rank = dist.get_rank()
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2, dtype=torch.float64), nn.Linear(2, 1), nn.Linear(1, 1)])
    model[3].requires_grad_(False)
    for module in model[:2]:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, float(rank))
    if rank == 0:
        model[2].weight.grad = torch.full_like(model[2].weight, 3.0)
    average_gradients(model)
    average_gradients(nn.ReLU())
    return [None if parameter.grad is None else parameter.grad.unique().tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("bucket", [2**20, 30, 1], ids="{}-bytes".format)
def test_gradients_are_the_mean_over_ranks(bucket: int) -> None:
    for grads in run_ranks(3, means, bucket):
        # Two linear layers; a weight that only rank 0 used, and a bias that none did; a frozen layer.
        assert grads == [[1.0], [1.0], [1.0], [1.0], [1.0], None, None, None]


def test_a_lone_process_keeps_its_gradients() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones_like(model.weight)
    average_gradients(model)
    assert model.weight.grad.unique().tolist() == [1.0]


def sharded() -> str:
    model = nn.Linear(4, 4)
    fully_shard(model)
    with pytest.raises(ValueError, match="sharded by an engine") as error:
        average_gradients(model)
    return str(error.value)


def test_sharded_parameters_are_refused() -> None:
    first, second = run_ranks(2, sharded)
    assert first == second
    assert first.startswith("the parameters are sharded by an engine that averages gradients itself, or by tensor")
