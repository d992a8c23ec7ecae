"""Cases of losses and of parts of layers that compute some tokens at a time, and how far they are from one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from helpers import ddp, fsdp, largest_error, spy
from models import LLAMA, MODELS, Tiny, batch_of
from torch import Tensor, nn

import sp_attention
from sp_attention.region.versions import checkpoint_activations

TILE = 5
SOFTCAP = Tiny("Gemma2ForCausalLM", {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0})
GRANITE = Tiny("GraniteForCausalLM", {"logits_scaling": 3.0})
GRANITE_SWA = Tiny("GraniteSWAForCausalLM", {"sliding_window": 5, "logits_scaling": 3.0})
Batch = Mapping[str, Any]


def sizes_given(module: nn.Module) -> set[int]:
    """The numbers of tokens that a module is given, filled in as it is called."""
    found: set[int] = set()
    module.register_forward_pre_hook(spy(lambda module, args: found.add(args[0].shape[:-1].numel())))
    return found


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def losses_of_two(model: nn.Module, batch: Batch) -> Tensor:
    """Of two forwards before a backward, with other lengths and so with other tiles."""
    return model(**batch).loss + 2 * model(**batch_of("packed", 20)).loss


def counted(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch, num_items_in_batch=torch.tensor(7)).loss


def shifted(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch["labels"]
    return model(**batch, shift_labels=F.pad(labels, (0, 2), value=-100)[:, 2:].contiguous()).loss


def with_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's loss, and one of all logits, which are made when they are asked for."""
    output = model(**batch)
    logits = output.logits if isinstance(output.logits, Tensor) else output.logits.whole()
    return output.loss + F.cross_entropy(logits[:, 16], torch.arange(2))


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def frozen_head(model: nn.Module) -> nn.Module:
    model.lm_head.requires_grad_(False)
    return model


def only_head(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def hooked(model: nn.Module) -> nn.Module:
    """With a hook of the user's on the gradient of the head's weights."""
    model.lm_head.weight.register_hook(lambda grad: 3 * grad)
    return model


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    checkpoint_activations(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@dataclass(frozen=True)
class Case:
    """tiny: a model. kind: of its batch. computed: from model and batch to a loss.

    prepared: what is done to it and to the reference. wrapped: what is done to it alone.
    """

    tiny: Tiny = LLAMA
    kind: str = "plain"
    computed: Callable[[nn.Module, Batch], Tensor] = loss_of
    prepared: Callable[[nn.Module], nn.Module] = as_it_is
    wrapped: Callable[[nn.Module], nn.Module] = as_it_is


CASES = {
    "plain": Case(),
    "padded": Case(kind="left-padded"),
    "packed": Case(kind="packed"),
    "a rank without targets": Case(kind="prompt-masked"),
    "tied": Case(MODELS["llama-tied"]),
    "a bias in the head": Case(Tiny("PhiForCausalLM")),
    "experts": Case(MODELS["mixtral"]),
    "logits capped": Case(SOFTCAP, computed=with_logits),
    "cut at the head": Case(MODELS["gpt2"], "left-padded", with_logits),
    "cut at the head, two forwards": Case(MODELS["gpt2"], computed=losses_of_two),
    "cut at the head, a rank without targets": Case(MODELS["gpt2"], "prompt-masked", wrapped=ddp),
    "cut at the head, a region around every layer": Case(GRANITE_SWA, computed=with_logits),
    "logits scaled": Case(GRANITE, "left-padded"),
    "logits scaled, fsdp2": Case(GRANITE, wrapped=partial(fsdp, apart="lm_head")),
    "num_items_in_batch": Case(kind="right-padded", computed=counted),
    "shift_labels": Case(computed=shifted),
    "logits": Case(computed=with_logits),
    "two forwards": Case(computed=losses_of_two),
    "frozen head": Case(prepared=frozen_head),
    "only the head": Case(prepared=only_head),
    "hook on a weight": Case(prepared=hooked),
    "checkpointed": Case(computed=losses_of_two, wrapped=partial(checkpointed, reentrant=False)),
    "checkpointed, re-entrant": Case(computed=losses_of_two, wrapped=partial(checkpointed, reentrant=True)),
    "ddp": Case(wrapped=ddp),
    "ddp, static graph": Case(wrapped=partial(ddp, static_graph=True)),
    "ddp, unused parameters": Case(wrapped=partial(ddp, find_unused_parameters=True)),
    "fsdp2": Case(computed=with_logits, wrapped=fsdp),
    "fsdp2, head apart": Case(wrapped=partial(fsdp, apart="lm_head")),
    "fsdp2, checkpointed": Case(
        computed=losses_of_two, wrapped=lambda model: fsdp(checkpointed(model, reentrant=False), apart="lm_head")
    ),
}
# GraniteSWA came with transformers 5.15.
CASES = {name: case for name, case in CASES.items() if case.tiny.is_here}
CHECKPOINTED = ("checkpointed", "checkpointed, re-entrant", "fsdp2, checkpointed")


def ids_of(cases: dict[str, Case]) -> list[str]:
    """The model and the case, for `-k`."""
    return [f"{case.tiny.name}, {name}" for name, case in cases.items()]


def error_of(
    case: Case, measured: str | tuple[str, ...] = "lm_head", offloads: bool = False, **options: Any
) -> tuple[float, int, str]:
    """The largest relative error of loss and gradients, to what may be; the most tokens that a module was given; the
    report. `measured`: the name of that module."""
    reference, model = case.prepared(case.tiny.build()), case.prepared(case.tiny.build())
    handle = sp_attention.enable(model, backend="sdpa", **options)
    handle.hooks.plan = replace(handle.hooks.plan, offloads=offloads)
    sizes = sizes_given(next(module for name, module in model.named_modules() if name.endswith(measured)))

    def step(each: nn.Module) -> list[Tensor]:
        loss = case.computed(each, batch_of(case.kind, 33))
        loss.backward()
        return [loss.detach()]

    return largest_error(reference, case.wrapped(model), step) / case.tiny.tolerance, max(sizes), handle.report()
