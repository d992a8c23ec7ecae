"""Prove that MLPs and norms give the same numbers when they are given a tile of tokens at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sp_attention.distributed.consistency import attempted
from sp_attention.errors import Refused, UnsupportedError
from sp_attention.region.hooks import Hooks
from sp_attention.region.plan import RegionPlan
from sp_attention.rehearsal.dummy_inputs import DummyBatch
from sp_attention.rehearsal.findings import EVERYTHING, Findings, LayerFindings
from sp_attention.rehearsal.position_wise import matrices_in
from sp_attention.rehearsal.trace import require_same, with_gradients


def tile_mlps(
    model: PreTrainedModel, hooks: Hooks, plan: RegionPlan, findings: Findings, dummy: DummyBatch, tile: int
) -> tuple[Findings, RegionPlan]:
    """The plan with modules that are given tiles of tokens, and the findings with what is said of them.

    Raises UnsupportedError where there are none, or the model gives other numbers so.
    """
    recorded = may_record(model)
    tiled: list[nn.Module] = []

    def told(found: LayerFindings) -> LayerFindings:
        kinds = dict(found.kinds)
        for name, module in found.tileable.items() if found.gathers != EVERYTHING else ():
            if any(recorded(*one) for one in module.named_modules(prefix=name)):
                kinds[name] += ", all tokens at a time, since transformers records what its parts return"
            else:
                kinds[name] += f", {tile} tokens at a time in training"
                tiled.append(module)
        return replace(found, kinds=kinds)

    stacks = {name: tuple(map(told, layers)) for name, layers in findings.stacks.items()}
    if not any(matrices_in(module) > 1 for module in tiled):
        raise UnsupportedError(
            f"mlp_tile={tile}: no part of a layer of {type(model).__name__} can be given some tokens at a time: it "
            "has to be a module beside attention with several matrices, that is given hidden states and returns hidden "
            "states, and of which transformers records nothing. Leave mlp_tile out"
        )

    def compare() -> None:
        require_same(with_gradients(model, dummy.inputs), expected, f"mlp_tile={tile}: {type(model).__name__} with it")

    planned = replace(plan, tiled_modules=tuple(tiled), mlp_tile=tile)
    with hooks.trying(plan):
        expected = with_gradients(model, dummy.inputs)
    with hooks.trying(replace(planned, mlp_tile=2)):
        refused = attempted(compare, hooks.peers, model.device)
    if isinstance(refused, Refused):
        raise UnsupportedError(refused.reason)
    return replace(findings, stacks=stacks), planned


def may_record(model: PreTrainedModel) -> Callable[[str, nn.Module], bool]:
    """Whether transformers may record what a module of that name returns, call by call, such as a router's logits."""
    kinds: list[Any] = []
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            for specs in inner.can_record_outputs.values():
                for one in specs if isinstance(specs, list) else [specs]:
                    kinds += [getattr(one, "target_class", one), getattr(one, "class_name", None)]
    classes = tuple(kind for kind in kinds if isinstance(kind, type))
    endings = tuple(kind for kind in kinds if isinstance(kind, str))
    return lambda name, module: isinstance(module, classes) or name.endswith(endings)
