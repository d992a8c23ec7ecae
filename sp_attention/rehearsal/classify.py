"""The rehearsal in enable(): tiny forwards that find the stacks of layers, and what each part of a layer is.

There is no table of model names. Two forwards of different batch and length tell which dims are the sequence. What
attends through transformers' attention interface can be head-parallel; a part is position-wise if it gives for some
tokens alone what it gives for them within the sequence; anything else is a mixer, and is given whole tensors.
"""

from collections.abc import Container, Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from sp_attention.errors import UnsupportedError
from sp_attention.mixers.declared import Mixer
from sp_attention.mixers.registry import usable
from sp_attention.region.context import Context
from sp_attention.region.mixer_calls import MixerCalls, calls_in, told_of_mixers
from sp_attention.region.plan import Embedding, GatheredModule, Layer, named_arguments, tensor_names
from sp_attention.rehearsal.dummy_inputs import DummyBatch
from sp_attention.rehearsal.findings import (
    EVERYTHING,
    HEAD_PARALLEL,
    MIXERS,
    MIXES,
    POSITION_WISE,
    Findings,
    LayerFindings,
)
from sp_attention.rehearsal.layer_stacks import StackDraft, dims_of, drafts_of, embedding_of
from sp_attention.rehearsal.position_wise import PositionWiseProof, children_of, fits, keeps_more, parts_of
from sp_attention.rehearsal.prove_length import LongProof, length_beyond
from sp_attention.rehearsal.trace import AttentionCall, Traces, record


def explore(
    model: PreTrainedModel,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    attention_calls: list[AttentionCall],
    *,
    proves: bool,
    attends: bool,
    context: Context,
    longest: int,
) -> tuple[Findings, Traces]:
    """Find the stacks of a model and what their parts are, from pairs of a narrow and a wide dummy batch of one kind.

    Unless it `proves`, what does not attend is taken to be position-wise in layers in which something does.
    Raises UnsupportedError when there is nothing that works on a sequence, and when the model should attend through us
    and does not.
    """
    known = usable(model.device.type) if proves else {}
    traces, proof = _traced(model, pairs, attention_calls, proves=proves, attends=attends)
    names = {module: name for name, module in model.named_modules()}
    drafts, left_alone = drafts_of(model, traces)
    position_wise = set(model.modules())
    if proves:
        position_wise = _proven(model, pairs[0][0], attention_calls, PositionWiseProof(drafts, traces[0][1], proof))
    else:
        # Where nothing attends through us, something else mixes tokens: what it is has to be found in any case.
        suspects = PositionWiseProof(_silent(drafts), traces[0][1], {})
        position_wise -= suspects.suspects.keys()
        if model.device.type != "meta":
            position_wise |= _proven(model, pairs[0][0], attention_calls, suspects)
    settings = model.config.to_dict()
    long_proof = LongProof(*traces[0], max(longest, length_beyond(settings)), settings, context)

    def found_in(layer: Layer, draft: StackDraft) -> LayerFindings:
        def find(mixers: frozenset[nn.Module] = frozenset()) -> LayerFindings:
            return _found(layer, draft, names, traces, position_wise - mixers, known, mixers)

        return long_proof(layer, draft.extents, find) if proves else find()

    stacks: dict[str, tuple[LayerFindings, ...]] = {}
    idle: dict[str, tuple[LayerFindings, ...]] = {}
    for draft in drafts:
        found = tuple(found_in(layer, draft) for layer in draft.layers)
        if proves and not draft.attends and all(layer.module in position_wise for layer in draft.layers):
            left_alone[draft.name] = POSITION_WISE
            if any(parameter.dim() > 1 for layer in draft.layers for parameter in layer.module.parameters()):
                idle[draft.name] = found
        else:
            stacks[draft.name] = found
    if not stacks:
        lists = "; ".join(f"{name}: {why}" for name, why in left_alone.items())
        raise UnsupportedError(
            f"{type(model).__name__} has no stack of layers that hand on a sequence, so there is nothing to share out "
            f"({lists or 'it has no list of modules'})"
        )
    models = _models_around(model, stacks)
    inside = tuple(f"{stack}." for stack in stacks)
    findings = Findings(
        stacks,
        idle,
        separate=frozenset(draft.name for draft in drafts if draft.separate),
        extents={draft.name: draft.extents[0] for draft in drafts},
        left_alone={name: why for name, why in left_alone.items() if not name.startswith(inside)},
        models=models,
        arguments={one: _given(one, traces) for one in models},
        cross_attention=frozenset(
            module for draft in drafts for module, mode in draft.modes.items() if mode == "cross-attention"
        ),
        embeddings=_embeddings([draft for draft in drafts if draft.name in stacks], traces, names) if proves else {},
        samples=tuple(long_proof.samples),
        proven_length=long_proof.length if proves else 0,
    )
    return findings, traces


def _traced(
    model: PreTrainedModel,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    attention_calls: list[AttentionCall],
    *,
    proves: bool,
    attends: bool,
) -> tuple[Traces, dict[nn.Module, bool]]:
    """A narrow and a wide trace of each pair, and whether parts are position-wise, as far as that was proven."""
    traces: Traces = []
    results: dict[nn.Module, bool] = {}
    for narrow, wide in reversed(pairs):
        other = record(model, wide, attention_calls)
        if attends and not other.attention_calls:
            raise UnsupportedError(f"{type(model).__name__} does not attend through transformers' attention interface")
        # Proven on the first kind, which has padding, while it is recorded: the other kinds have told the stacks.
        prove = PositionWiseProof(drafts_of(model, traces)[0], other, results) if proves and traces else None
        traces.insert(0, (record(model, narrow, attention_calls, prove), other))
    return traces, results


def _proven(
    model: PreTrainedModel, narrow: DummyBatch, attention_calls: list[AttentionCall], proof: "PositionWiseProof"
) -> set[nn.Module]:
    """The parts that are position-wise; what is still to be proven is, in one more forward. All else is not."""
    if not proof.suspects.keys() <= proof.results.keys():
        record(model, narrow, attention_calls, proof)
    return {module for module, is_position_wise in proof.results.items() if is_position_wise}


def _silent(drafts: list[StackDraft]) -> list[StackDraft]:
    """The stacks with their layers in which nothing attends."""
    found = [
        replace(draft, layers=tuple(one for one in draft.layers if draft.modes.keys().isdisjoint(one.module.modules())))
        for draft in drafts
    ]
    return [draft for draft in found if draft.layers]


def _models_around(
    model: PreTrainedModel, stacks: Mapping[str, tuple[LayerFindings, ...]]
) -> tuple[PreTrainedModel, ...]:
    """Those in which there are layers of stacks, outermost first."""
    hooked = {found.layer.module for layers in stacks.values() for found in layers}
    return tuple(
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and not hooked.isdisjoint(module.modules())
    )


def _embeddings(drafts: list[StackDraft], traces: Traces, names: Mapping[nn.Module, str]) -> dict[str, Embedding]:
    every = [trace for pair in traces for trace in pair]
    found = {draft.name: embedding_of(draft.layers[0], every, names) for draft in drafts if not draft.separate}
    return {name: embedding for name, embedding in found.items() if embedding is not None}


# What a module does that attends, by how it does.
_MODES = {
    "shared": HEAD_PARALLEL,
    "cross-attention": "attends from this rank's tokens to all of another sequence",
}


def _found(
    layer: Layer,
    draft: StackDraft,
    names: Mapping[nn.Module, str],
    traces: Traces,
    position_wise: Container[nn.Module],
    known: Mapping[str, Mixer],
    whole: Container[nn.Module],
) -> LayerFindings:
    """What the parts of a layer are, and which are gathered: `whole` in any case, whatever functions they call."""
    kinds = {
        names[module]: _MODES.get(draft.modes[module], "gathered: attends to something else than the sequence")
        for module in layer.module.modules()
        if module in draft.modes
    }
    mixers: list[GatheredModule] = []
    attending: list[GatheredModule] = []
    parts: list[GatheredModule] = []
    tileable: dict[str, nn.Module] = {}
    others = {module for module, mode in draft.modes.items() if mode == "other"}
    everything = layer.module in others
    for child in children_of(layer.module):
        attends = not draft.modes.keys().isdisjoint(child.modules())
        if attends:
            gathered = _gathered(child, names, traces, draft)
            if gathered is None or others.intersection(child.modules()):
                everything |= gathered is None
                mixers += [gathered] if gathered is not None else []
                continue
            attending.append(replace(gathered, attends=True))
        for module in parts_of(child, set(draft.modes)):
            calls = traces[0][0].calls[module]
            if not calls:
                # If it is called after all, it is refused for what it is given.
                mixers.append(GatheredModule(names[module], module, {}, {}))
            elif module in position_wise:
                kinds[names[module]] = POSITION_WISE
                learning = _gathered(module, names, traces, draft) if any(True for _ in module.parameters()) else None
                parts += [learning] if learning is not None else []
                if not attends and keeps_more(module) and all(fits(call.inputs, call.output) for call in calls):
                    tileable[names[module]] = module
            else:
                shared = () if module in whole else calls_in(module, known)
                kinds[names[module]] = told_of_mixers(shared) if shared else MIXES
                gathered = _gathered(module, names, traces, draft, shared)
                everything |= gathered is None
                mixers += [gathered] if gathered is not None else []
    layer = replace(layer, heads=draft.heads_in(layer.module))
    gathers = EVERYTHING if everything else MIXERS
    return LayerFindings(layer, kinds, tuple(mixers), tuple(parts), tuple(attending), tileable, gathers)


def _gathered(
    module: nn.Module,
    names: Mapping[nn.Module, str],
    traces: Traces,
    draft: StackDraft,
    calls: tuple[MixerCalls, ...] = (),
) -> GatheredModule | None:
    """A module on whole tensors; None when its calls disagree on where the sequence is."""
    arguments = dims_of(module, traces, draft.extents, lambda call: call.inputs)
    results = dims_of(module, traces, draft.extents, lambda call: call.output)
    if arguments is None or results is None:
        return None
    return GatheredModule(names[module], module, arguments, results, calls=calls)


def _given(model: nn.Module, traces: Traces) -> frozenset[str]:
    """The names of the tensors that a model was given."""
    calls = [call for pair in traces for trace in pair for call in trace.calls[model]]
    return frozenset().union(*(tensor_names(named_arguments(model, *call.inputs)) for call in calls))
