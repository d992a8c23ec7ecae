"""Prove that stacks on this rank's span give what the whole model gives; fall back step by step where they do not.

Slower each time: mixers, what attends, whole layers on whole tensors; a region around every layer instead of one around
the stack; and in the end a refusal.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from transformers import PreTrainedModel

from sp_attention.distributed import rng
from sp_attention.distributed.collectives import mean_over_ranks
from sp_attention.distributed.consistency import attempted
from sp_attention.errors import Refused, UnsupportedError
from sp_attention.region.hooks import Hooks
from sp_attention.region.plan import GatheredModule, Layer, RegionPlan, Stack
from sp_attention.rehearsal.draws import Draws, TrainingRun
from sp_attention.rehearsal.findings import EVERYTHING, Findings, LayerFindings
from sp_attention.rehearsal.position_wise import matrices_in
from sp_attention.rehearsal.trace import Trace, require_same, with_gradients

# The layers of a stack.
Stacked = tuple[LayerFindings, ...]


def prove_stacks(
    model: PreTrainedModel,
    hooks: Hooks,
    plan: RegionPlan,
    findings: Findings,
    traces: list[Trace],
    run: TrainingRun,
) -> Findings:
    """The findings with as much gathered as the sharded model needs to give what the whole one gives.

    In evaluation that is what it gave in the traces, and in training what it gave in `run`, with gradients.
    """
    name = type(model).__name__

    def compare() -> None:
        model.eval()
        for trace in traces:
            require_same(model(**trace.dummy.inputs), trace.output, f"{name} sharded")
        model.train()
        with run.draws.harmless():
            output, gradients = with_gradients(model, run.inputs)
        require_same(output, run.output, f"{name} sharded, in training")
        gradients = mean_over_ranks(gradients, hooks.peers)
        require_same(gradients, run.gradients, f"the backward of {name} sharded")

    def tried(found: Findings) -> Refused | None:
        with hooks.trying(replace(plan, stacks=found.planned())):
            return attempted(compare, hooks.peers, model.device)

    refused = tried(findings)
    if refused is not None and findings.embeddings:
        findings = replace(findings, embeddings={})
        refused = tried(findings)
    if refused is None:
        return findings
    for found in _falling_back(hooks, plan, findings, traces, run.draws):
        if not found.shares_nothing and tried(found) is None:
            return found
    raise UnsupportedError(f"{refused.reason}; nothing of it can be shared out exactly")


def _falling_back(
    hooks: Hooks, plan: RegionPlan, findings: Findings, traces: list[Trace], draws: Draws
) -> Iterator[Findings]:
    """The findings with more and more on whole tensors: mixers and what attends, regions around layers, all of it.

    Mixers whose functions could share their work are among them: of a layer alone first, and then of all.
    Between these, parts whose results are position-wise: first those of several matrices, such as MLPs and experts,
    of which a balance loss may be made, then norms too.
    """
    enough = {
        name: tuple(_gathering_enough(found, hooks, plan, traces, draws) for found in layers)
        for name, layers in findings.stacks.items()
    }
    as_tried, findings = findings, replace(findings, stacks=enough)
    everything = {
        name: tuple(replace(found, gathers=EVERYTHING) for found in layers) for name, layers in findings.stacks.items()
    }
    apart = frozenset({*findings.stacks, *findings.idle})
    if findings != as_tried:
        yield findings
    if any(found.sharing for layers in enough.values() for found in layers):
        # Numbers of each layer alone were compared, and not gradients.
        whole = {name: tuple(found.sharing_only(()) for found in layers) for name, layers in enough.items()}
        findings = replace(findings, stacks=whole)
        yield findings
        yield replace(findings, stacks=enough, separate=apart)
    yield replace(findings, separate=apart)
    for matrices in (2, 0):
        yield replace(findings, stacks=_gathering_parts(findings.stacks, matrices))
    yield replace(findings, stacks=everything)
    yield replace(findings, stacks=findings.idle, separate=apart)


def _gathering_parts(stacks: Mapping[str, Stacked], matrices: int) -> dict[str, Stacked]:
    """Stacks whose parts of as many matrices or more are given whole tensors."""
    return {
        name: tuple(
            found.with_mixers(part for part in found.parts if matrices_in(part.module) >= matrices) for found in layers
        )
        for name, layers in stacks.items()
    }


def _gathering_enough(
    found: LayerFindings, hooks: Hooks, plan: RegionPlan, traces: list[Trace], draws: Draws
) -> LayerFindings:
    """The layer with as much gathered as it needs to give alone, sharded, what it gives whole, in either mode."""
    module, device = found.layer.module, plan.models[0].device
    given = [call.inputs for trace in traces for call in trace.calls[module]]

    def outputs() -> list[Any]:
        results = []
        for (args, kwargs), trains in product(given, (False, True)):
            module.train(trains)
            rng.seed_all(0)
            with hooks.as_in_a_forward(), draws.harmless():
                results.append(module(*args, **kwargs))
        return results

    everything = replace(found, gathers=EVERYTHING)
    with hooks.trying(_with_layer(plan, everything.planned())):
        whole = attempted(outputs, hooks.peers, device)
    if isinstance(whole, Refused):
        return everything

    def compare() -> None:
        for output, expected in zip(outputs(), whole, strict=True):
            require_same(output, expected, found.layer.name)

    def is_exact(less: LayerFindings) -> bool:
        with hooks.trying(_with_layer(plan, less.planned())):
            return attempted(compare, hooks.peers, device) is None

    for gathers in range(found.gathers, EVERYTHING):
        less = replace(found, gathers=gathers)
        if is_exact(less):
            return less
        if less.sharing and is_exact(less.sharing_only(())):
            return _sharing_most(less, is_exact)
    return everything


def _sharing_most(found: LayerFindings, is_exact: Callable[[LayerFindings], bool]) -> LayerFindings:
    """The layer with those of its mixers sharing their work that can, of several that cannot all."""
    shared: tuple[GatheredModule, ...] = ()
    for one in found.sharing if len(found.sharing) > 1 else ():
        if is_exact(found.sharing_only((*shared, one))):
            shared = (*shared, one)
    return found.sharing_only(shared)


def _with_layer(plan: RegionPlan, layer: Layer) -> RegionPlan:
    """The plan with a layer in place of the one of the same module."""

    def changed(stack: Stack) -> Stack:
        return replace(stack, layers=tuple(layer if one.module is layer.module else one for one in stack.layers))

    return replace(plan, stacks=tuple(map(changed, plan.stacks)))
