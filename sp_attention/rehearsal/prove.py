"""Prove that stacks on this rank's span give what the whole model gives; fall back step by step where they do not.

Slower each time: mixers, what attends, whole layers on whole tensors; a region around every layer instead of one around
the stack; and in the end a refusal.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sp_attention.distributed.collectives import mean_over_ranks
from sp_attention.distributed.consistency import attempted
from sp_attention.errors import Refused, UnsupportedError
from sp_attention.region.hooks import Hooks
from sp_attention.region.plan import Layer, RegionPlan, Stack
from sp_attention.rehearsal.findings import EVERYTHING, Findings, LayerFindings
from sp_attention.rehearsal.trace import Trace, require_same, with_gradients


def prove_stacks(
    model: PreTrainedModel,
    hooks: Hooks,
    plan: RegionPlan,
    findings: Findings,
    traces: list[Trace],
    last: tuple[Any, Tensor],
) -> Findings:
    """The findings with as much gathered as the sharded model needs to give what the whole one gives.

    `last` is what the whole model gives for the last trace's batch, in the mode that it is in, with its gradients; the
    traces were recorded in evaluation.
    """
    trains = model.training

    def compare() -> None:
        model.eval()
        for trace in traces[:-1]:
            require_same(model(**trace.dummy.inputs), trace.output, f"{type(model).__name__} sharded")
        model.train(trains)
        output, gradients = with_gradients(model, traces[-1].dummy.inputs)
        require_same(output, last[0], f"{type(model).__name__} sharded")
        gradients = mean_over_ranks(gradients, hooks.peers)
        require_same(gradients, last[1], f"the backward of {type(model).__name__} sharded")

    def tried(found: Findings) -> Refused | None:
        with hooks.trying(replace(plan, stacks=found.planned())):
            return attempted(compare, hooks.peers, model.device)

    refused = tried(findings)
    if refused is not None and findings.embeddings:
        findings = replace(findings, embeddings={})
        refused = tried(findings)
    if refused is None:
        return findings
    for found in _falling_back(hooks, plan, findings, traces):
        if not found.shares_nothing and tried(found) is None:
            return found
    raise UnsupportedError(f"{refused.reason}; nothing of it can be shared out exactly")


def _falling_back(hooks: Hooks, plan: RegionPlan, findings: Findings, traces: list[Trace]) -> Iterator[Findings]:
    """The findings with more and more on whole tensors: mixers and what attends, regions around layers, all of it."""
    enough = {
        name: tuple(_gathering_enough(found, hooks, plan, traces) for found in layers)
        for name, layers in findings.stacks.items()
    }
    findings = replace(findings, stacks=enough)
    everything = {
        name: tuple(replace(found, gathers=EVERYTHING) for found in layers) for name, layers in findings.stacks.items()
    }
    apart = frozenset({*findings.stacks, *findings.idle})
    yield findings
    yield replace(findings, separate=apart)
    yield replace(findings, stacks=everything)
    yield replace(findings, stacks=findings.idle, separate=apart)


def _gathering_enough(found: LayerFindings, hooks: Hooks, plan: RegionPlan, traces: list[Trace]) -> LayerFindings:
    """The layer with as much gathered as it needs to give alone, sharded, what it gave in the rehearsal."""
    for gathers in range(found.gathers, EVERYTHING + 1):
        found = replace(found, gathers=gathers)
        layer = found.planned()

        def compare(layer: Layer = layer) -> None:
            for trace in traces:
                for called in trace.calls[layer.module]:
                    with hooks.as_in_a_forward():
                        args, kwargs = called.inputs
                        require_same(layer.module(*args, **kwargs), called.output, layer.name)

        with hooks.trying(_with_layer(plan, layer)):
            refused = attempted(compare, hooks.peers, plan.models[0].device)
        if refused is None:
            break
    return found


def _with_layer(plan: RegionPlan, layer: Layer) -> RegionPlan:
    """The plan with a layer in place of the one of the same module."""

    def changed(stack: Stack) -> Stack:
        return replace(stack, layers=tuple(layer if one.module is layer.module else one for one in stack.layers))

    return replace(plan, stacks=tuple(map(changed, plan.stacks)))
