"""Where a model draws random numbers in training, such as those of dropout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sp_attention.distributed import rng
from sp_attention.rehearsal.findings import Findings
from sp_attention.rehearsal.trace import same_buffers, with_gradients


@dataclass(frozen=True)
class Draws:
    """Where a model draws random numbers in training: at all, between which stacks' layers, after the last layer."""

    anywhere: bool = False
    between: frozenset[str] = frozenset()
    after: bool = False


def draws_of(model: PreTrainedModel, findings: Findings, inputs: Mapping[str, Any]) -> tuple[Draws, tuple[Any, Tensor]]:
    """Where random numbers are drawn, and the model's output with gradients; in training unless there are any."""
    seen: list[tuple[str | None, list[Tensor]]] = []
    handles = []
    for name, layers in findings.stacks.items():
        for found in layers:
            module = found.layer.module

            def note(*_: Any, name: str = name) -> None:
                seen.append((name, rng.states(model.device)))

            handles += [module.register_forward_pre_hook(note), module.register_forward_hook(note)]
    model.train()
    before = rng.states(model.device)
    try:
        with same_buffers(model):
            result = with_gradients(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    after = rng.states(model.device)
    if rng.are_equal(before, after):
        return Draws(), result
    model.eval()
    # Two notes a layer: what lies between the second of one and the first of the next is the model's own.
    gaps = [(one, other) for one, other in zip(seen[1::2], seen[2::2], strict=False) if one[0] == other[0]]
    between = frozenset(str(one[0]) for one, other in gaps if not rng.are_equal(one[1], other[1]))
    draws = Draws(True, between, not seen or not rng.are_equal(seen[-1][1], after))
    return draws, with_gradients(model, inputs)
