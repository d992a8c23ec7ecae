"""Gather and sum over ranks: their gradients."""

import pytest
import torch
from helpers import WholeOnEveryRank, world
from torch import Tensor

from sp_attention.distributed.collectives import gather, sum_over_ranks
from sp_attention.launch import run_ranks


def check_other_gradients() -> bool:
    peers = world()
    torch.manual_seed(0)
    whole = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def gathered_along(whole: Tensor, dim: int) -> Tensor:
        span = peers.span(whole.shape[dim])
        mine = WholeOnEveryRank.apply(whole).narrow(dim, span.start, len(span))
        return gather(mine**2, whole.shape[dim], peers, dim)

    def summed(whole: Tensor) -> Tensor:
        mine = WholeOnEveryRank.apply(whole)[:, peers.span(5).start : peers.span(5).stop]
        return sum_over_ranks((mine**3).sum(), peers) ** 2

    return (
        torch.autograd.gradcheck(lambda x: gathered_along(x, 1), whole)
        and torch.autograd.gradcheck(lambda x: gathered_along(x, 2), whole)
        and torch.autograd.gradcheck(summed, whole)
    )


@pytest.mark.parametrize("ranks", [2, 3], ids="P{}".format)
def test_gradients_of_gather_and_sum_are_numerically_right(ranks: int) -> None:
    assert all(run_ranks(ranks, check_other_gradients))
