"""Of stage exchange: fused losses of an LM head beside all logits at once, seconds, memory and errors."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_stages import machine
from gpu_stages.results import CANNOT, NOT_RUN, RIGHT, WRONG, Results
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput, tile_for


@dataclass(frozen=True)
class Head:
    """An LM head: tokens, hidden size, vocabulary."""

    tokens: int
    hidden: int
    vocabulary: int


HEADS = {"Llama-8B": Head(8192, 4096, 128256), "Gemma": Head(8192, 2304, 256000)}
REHEARSED_HEADS = {"a small one": Head(256, 64, 2048)}


def run(results: Results, device: torch.device) -> None:
    for name, head in (REHEARSED_HEADS if machine.is_stand_in(device) else HEADS).items():
        for loss, function in LOSSES.items():
            results.row("Losses", {"head": name, "loss": loss}, partial(_loss, loss, function, head, device))


def _head(head: Head, device: torch.device) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(head.hidden, head.vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    hidden = torch.randn(1, head.tokens, head.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    return module, hidden, torch.randint(head.vocabulary, (1, head.tokens), device=device)


def _ours(module: nn.Linear, hidden: Tensor, targets: Tensor, liger: bool = False) -> Tensor:
    """The tiled loss, by its own tiles or by Liger's kernel."""
    head = LMHead(
        module, "lm_head", () if liger else (_same,), module.out_features, tile_for(module.out_features), liger
    )
    return LMHeadInput(head, module, hidden, head.tiles(hidden.shape[1]), nullcontext).loss(targets, -100)


def _same(logits: Tensor) -> Tensor:
    return logits[:]


def _at_once(module: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(module(hidden).float().flatten(0, 1), targets.flatten(), reduction="sum")


def _torchs(module: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=tile_for(module.out_features))
    return F.linear_cross_entropy(
        hidden.flatten(0, 1), module.weight, targets.flatten(), reduction="sum", options=options
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "all logits at once": _at_once,
    "ours, in tiles": _ours,
    "ours, by Liger's kernel": partial(_ours, liger=True),
    "torch's linear_cross_entropy": _torchs,
}


def _loss(name: str, function: Callable[..., Tensor], head: Head, device: torch.device) -> dict[str, Any]:
    """Seconds and memory of forward and backward, and how far loss and gradients are from float32's."""
    if "Liger" in name and (find_spec("liger_kernel") is None or machine.is_stand_in(device)):
        return {"outcome": f"{NOT_RUN}: Liger's kernel is not installed, or the CPU has none"}
    if function is _torchs and not hasattr(F, "linear_cross_entropy"):
        return {"outcome": f"{CANNOT}: torch {torch.__version__} has no linear_cross_entropy"}
    module, hidden, targets = _head(head, device)
    held: list[Tensor] = []

    def step() -> None:
        loss = function(module, hidden, targets)
        held[:] = [loss.detach(), *torch.autograd.grad(loss, (hidden, module.weight))]

    step()
    found = [one.float().cpu() for one in held]
    held.clear()
    before = machine.forget(device)
    seconds = machine.seconds_of(step, device, times=2)
    held.clear()
    spent = machine.peak(device) - before
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, _exact(head, device), strict=True)]
    worst = max(errors)
    # A loss in bfloat16 that is summed in it is off by its rounding.
    word = RIGHT if worst <= 5e-2 else WRONG
    return {"outcome": f"{word}: off by {worst:.1e}", "ms": seconds * 1e3, "MiB over weights": spent // 2**20}


def _exact(head: Head, device: torch.device) -> list[Tensor]:
    """Loss and gradients by float32, some tokens at a time."""
    module, hidden, targets = _head(head, device)
    wide, total = module.float(), torch.zeros((), device=device)
    weight, grads = torch.zeros_like(wide.weight), []
    for some, wanted in zip(hidden.detach().float().split(1024, 1), targets.split(1024, 1), strict=True):
        some.requires_grad_()
        loss = _at_once(wide, some, wanted)
        grad, of_weight = torch.autograd.grad(loss, (some, wide.weight))
        total, weight = total + loss.detach(), weight.add_(of_weight)
        grads.append(grad)
    return [one.cpu() for one in (total, torch.cat(grads, 1), weight)]
