"""Liger's own kernel for the head and the loss, in Triton's interpreter, against torch."""

import multiprocessing
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import Tensor, nn

from sp_attention.distributed import launch
from sp_attention.launch import run_ranks
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput


def error_of(dtype: torch.dtype, liger: bool) -> float:
    """The largest relative error of loss and gradients after two backwards, with a bias and ignored targets."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 40, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    targets = torch.randint(40, (2, 9))
    targets[0, :3] = -100
    given = hidden.clone().requires_grad_()
    expected = F.cross_entropy(head(given).flatten(0, 1), targets.flatten(), reduction="sum")
    gradients = torch.autograd.grad(0.37 * expected, (given, *head.parameters()))
    head, given = head.to(dtype), hidden.to(dtype).requires_grad_()
    loss: Tensor = LMHeadInput(LMHead(head, "", (), 40, 5, liger), head, given, 4, nullcontext).loss(targets, -100)
    assert loss.dtype == torch.float32
    (0.37 * loss).backward(retain_graph=True)
    (0.63 * loss).backward()
    ours = [one.grad * 0.37 for one in (given, *head.parameters())]
    pairs = [(loss, expected), *zip(ours, gradients, strict=True)]
    return max(relative_error(one.detach().double(), other.detach()) for one, other in pairs)


def errors() -> dict[torch.dtype, tuple[float, float]]:
    return {dtype: (error_of(dtype, True), error_of(dtype, False)) for dtype in (torch.float32, torch.bfloat16)}


def test_its_kernel_gives_the_loss_and_gradients_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # Triton reads it when it is imported, and forks would have imported it.
    monkeypatch.setattr(launch, "CONTEXT", multiprocessing.get_context("spawn"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (found,) = run_ranks(1, errors, timeout=200)
    for dtype, (by_liger, by_tiles) in found.items():
        assert by_tiles < (1e-6 if dtype is torch.float32 else 2e-2)
        # Twice the error that torch has in the same precision.
        assert by_liger <= 2 * by_tiles + 1e-6
