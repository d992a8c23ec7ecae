"""torch's function for the head and the loss in one: where it is taken, and that it gives the same."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from models import MODELS, batch_of
from torch import Tensor, nn

import sp_attention
from sp_attention.launch import run_ranks
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput

TILE, IGNORED = 5, 7


def made(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head, hidden states [2, 9, 16] and targets, some of which are ignored."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 40, bias, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    targets = torch.randint(40, (2, 9)).masked_fill(torch.arange(9) < 3, IGNORED)
    return head.to(dtype), hidden.to(dtype).requires_grad_(), targets


def loss_of(head: nn.Module, hidden: Tensor, targets: Tensor, autocast: Any = nullcontext, **options: Any) -> Tensor:
    known = LMHead(head, "", options.get("steps", ()), 40, TILE)
    return LMHeadInput(known, head, hidden, known.tiles(18), autocast).loss(targets, IGNORED)


def is_taken(*given: Any, **options: Any) -> bool:
    with patch.object(F, "linear_cross_entropy", wraps=F.linear_cross_entropy) as called:
        loss_of(*given, **options)
    return called.called


def learned(head: nn.Module, hidden: Tensor) -> list[Tensor]:
    return [one for one in (hidden, *head.parameters()) if one.requires_grad]


@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias"), ("hidden",)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_all_logits(bias: bool, frozen: tuple[str, ...]) -> None:
    found = {}
    for dtype in (torch.float32, torch.float64):
        head, hidden, targets = made(dtype, bias)
        for name, one in (("hidden", hidden), *head.named_parameters()):
            one.requires_grad_(name not in frozen)
        if dtype == torch.float32:
            assert is_taken(head, hidden, targets)
            loss = loss_of(head, hidden, targets)
            assert loss.dtype == torch.float32
        else:
            loss = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = 0.37 * loss
        gradients = [torch.autograd.grad(loss, learned(head, hidden), retain_graph=True) for _ in range(2)]
        assert all(map(torch.equal, *gradients))
        found[dtype] = [loss.detach(), *gradients[0]]
    for ours, expected in zip(*found.values(), strict=True):
        assert relative_error(ours.double(), expected) < 1e-6


def test_without_gradients_it_is_the_same_loss() -> None:
    given = made(torch.float32)
    expected = loss_of(*given).detach()
    with torch.no_grad():
        assert is_taken(*given)
        assert torch.equal(loss_of(*given), expected)


class Derived(nn.Linear):
    pass


def hooked(register: str, times: int, head: nn.Module) -> nn.Module:
    for _ in range(times):
        getattr(head, register)(lambda *args: None)
    return head


def derived(head: nn.Linear) -> nn.Module:
    head.__class__ = Derived
    return head


def patched(head: nn.Linear) -> nn.Module:
    head.forward = MethodType(lambda self, hidden: F.linear(hidden, self.weight, self.bias), head)
    return head


def of_an_engine(head: nn.Linear) -> nn.Module:
    head.weight.ds_numel = head.weight.numel()
    return head


def computed(head: nn.Linear) -> nn.Module:
    """By a hook of torch's before it, whose result is no parameter."""
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(head)


OTHERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "hook behind": partial(hooked, "register_forward_hook", 1),
    "hook before it, beside ours": partial(hooked, "register_forward_pre_hook", 2),
    "hook in backward": partial(hooked, "register_full_backward_hook", 1),
    "hook before backward": partial(hooked, "register_full_backward_pre_hook", 1),
    "derived": derived,
    "another forward": patched,
    "engine": of_an_engine,
    "computed weights": computed,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_head_that_is_more_than_a_matrix_is_called(name: str) -> None:
    head, hidden, targets = made(torch.float32)
    expected = loss_of(head, hidden, targets).detach()
    head = OTHERS[name](head)
    assert not is_taken(head, hidden, targets)
    assert relative_error(loss_of(head, hidden, targets).detach(), expected) < 1e-6


def test_with_our_own_hook_before_it_is_taken() -> None:
    head, hidden, targets = made(torch.float32)
    assert is_taken(hooked("register_forward_pre_hook", 1, head), hidden, targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_computed_as_forcausallmloss_does(dtype: torch.dtype) -> None:
    assert not is_taken(*made(dtype))


def test_steps_and_autocast_are_followed() -> None:
    given = made(torch.float32)
    for step in (torch.tanh, lambda logits: logits.mul_(2), lambda logits: logits[..., :40], Tensor.float):
        assert not is_taken(*given, steps=(step,))
    assert not is_taken(*given, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert is_taken(*given, autocast=partial(torch.autocast, "cpu", enabled=False))


def on_two_ranks() -> tuple[bool, float]:
    """Whether it is taken, and the largest relative error of loss and gradients."""
    reference, model = (MODELS["llama-tied"].build(dtype) for dtype in (torch.float64, torch.float32))
    sp_attention.enable(model, backend="sdpa", loss_tile=TILE)
    batch = batch_of("left-padded", 33)
    with patch.object(F, "linear_cross_entropy", wraps=F.linear_cross_entropy) as called:
        losses = [each(**batch).loss for each in (reference, model)]
    for loss in losses:
        loss.backward()
    sp_attention.average_gradients(model)
    pairs = [(losses[1], losses[0])]
    pairs += [(one.grad, other.grad) for one, other in zip(model.parameters(), reference.parameters(), strict=True)]
    return called.called, max(relative_error(one.detach().double(), other.detach().double()) for one, other in pairs)


def test_a_model_in_float32_gives_the_numbers_of_one_process() -> None:
    for taken, error in run_ranks(2, on_two_ranks, timeout=180):
        assert taken
        assert error < 1e-4
