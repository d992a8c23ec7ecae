"""Logits that are asked for after the forward: of the forward's weights, or refused."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import TWO_AND_THREE, averages_itself, ddp, fsdp, relative_error
from models import LLAMA, MODELS, Tiny, batch_of
from torch import Tensor, nn
from torch.func import functional_call

import sp_attention
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks

LENGTH = 21
REFUSED = "lm_head are not those of the forward any more"


def step(model: nn.Module, output: Any) -> None:
    output.loss.backward()
    if not averages_itself(model):
        sp_attention.average_gradients(model)
    torch.optim.SGD(model.parameters(), 0.5).step()


def behind_the_version(model: nn.Module, output: Any) -> None:
    """As optimizers of engines do, and adapters that are merged."""
    model.lm_head.weight.data += 1


def elsewhere(model: nn.Module, output: Any) -> None:
    """What is written to other weights does not matter."""
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)


def replaced(model: nn.Module, output: Any) -> None:
    """The weights of the forward are still there, and taken."""
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))


def converted(model: nn.Module, output: Any) -> None:
    model.lm_head.float()


def evaluated(model: nn.Module, output: Any) -> None:
    model.eval()


def backward(model: nn.Module, output: Any) -> None:
    output.loss.backward()


class Switched(nn.Module):
    """An LM head with an adapter that is on or off."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.is_on = head, True

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) * (2 if self.is_on else 1)


def switched(model: nn.Module, output: Any) -> None:
    model.lm_head.is_on = False


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def with_a_switch(model: nn.Module) -> nn.Module:
    model.lm_head = Switched(model.lm_head)
    return model


# What happens between the forward and the question: to which model, and whether the logits are refused then.
CASES: dict[str, tuple[Tiny, Callable[[nn.Module], nn.Module], Callable[[Any, Any], None], bool]] = {
    "backward": (LLAMA, as_it_is, backward, False),
    "step": (LLAMA, as_it_is, step, True),
    "step, tied": (MODELS["llama-tied"], as_it_is, step, True),
    "step, cut at the head": (MODELS["gpt2"], as_it_is, step, True),
    "step, ddp": (LLAMA, ddp, step, True),
    "step, fsdp2": (LLAMA, fsdp, step, True),
    "step, fsdp2, head apart": (LLAMA, partial(fsdp, apart="lm_head"), step, True),
    "backward, fsdp2": (LLAMA, fsdp, backward, True),
    "backward, fsdp2, head apart": (LLAMA, partial(fsdp, apart="lm_head"), backward, False),
    "behind the version": (LLAMA, as_it_is, behind_the_version, True),
    "elsewhere": (LLAMA, as_it_is, elsewhere, False),
    "replaced": (LLAMA, as_it_is, replaced, False),
    "converted": (LLAMA, as_it_is, converted, True),
    "evaluated": (LLAMA, as_it_is, evaluated, False),
    "switched": (LLAMA, with_a_switch, switched, True),
}


def asked_later() -> dict[str, str]:
    found = {}
    batch = batch_of("plain", LENGTH)
    for name, (tiny, wrapped, happens, is_refused) in CASES.items():
        model, reference = wrapped(tiny.build()), tiny.build()
        reference = with_a_switch(reference) if wrapped is with_a_switch else reference
        sp_attention.enable(model, backend="sdpa", loss_tile=4)
        expected = reference(**batch).logits.detach()
        output = model(**batch)
        happens(model, output)
        for ask in (lambda logits: logits.whole(), lambda logits: logits.part):
            if is_refused:
                with pytest.raises(UnsupportedError, match=REFUSED):
                    ask(output.logits)
        if not is_refused:
            found[name] = relative_error(output.logits.whole().detach(), expected)
        # The next forward is as ever.
        if name == "step":
            output = model(**batch)
            changed = copy.deepcopy(reference)
            changed.load_state_dict(model.state_dict())
            found[name] = relative_error(output.logits.whole().detach(), changed(**batch).logits.detach())
    return found


def test_logits_that_are_asked_for_later_are_those_of_the_forward_or_refused() -> None:
    for found in run_ranks(2, asked_later, timeout=200):
        assert set(found) == {name for name, (*_, is_refused) in CASES.items() if not is_refused} | {"step"}
        assert max(found.values()) < 1e-5


def with_other_weights() -> list[float]:
    """Weights that are put in for one call, and written to afterwards."""
    model, reference = LLAMA.build(), LLAMA.build()
    sp_attention.enable(model, backend="sdpa", loss_tile=4)
    batch = batch_of("plain", LENGTH)
    weights = {name: (1.3 * one).detach().requires_grad_() for name, one in reference.named_parameters()}
    outputs = [functional_call(each, weights, (), batch) for each in (model, reference)]
    ours, theirs = outputs[0].logits.whole(), outputs[1].logits
    errors = [relative_error(ours.detach(), theirs.detach())]
    # By their gradient path too: that of the head's weight, through the logits alone.
    grads = [torch.autograd.grad(one.pow(2).mean(), weights["lm_head.weight"])[0] for one in (ours, theirs)]
    torch.distributed.all_reduce(grads[0])
    errors.append(relative_error(grads[0] / torch.distributed.get_world_size(), grads[1]))
    with torch.no_grad():
        weights["lm_head.weight"] += 1
    with pytest.raises(UnsupportedError, match=REFUSED):
        outputs[0].logits.whole()
    return errors


@pytest.mark.parametrize("ranks", TWO_AND_THREE, ids="P{}".format)
def test_weights_of_a_functional_call_are_those_of_its_logits(ranks: int) -> None:
    for errors in run_ranks(ranks, with_other_weights, timeout=100):
        assert max(errors) < 1e-5
