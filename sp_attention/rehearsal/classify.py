"""The rehearsal in enable(): tiny forwards that find the stacks of layers, and what each part of a layer is.

There is no table of model names. Two forwards of different batch and length tell which dims are the sequence. What
attends through transformers' attention interface can be head-parallel; a part is position-wise if it gives for some
tokens alone what it gives for them within the sequence; anything else is a mixer, and is given whole tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sp_attention.errors import UnsupportedError
from sp_attention.region.plan import Embedding, Layer, Part, Stack, named_arguments, tensor_names
from sp_attention.region.pytree import Path, map_leaves
from sp_attention.region.sequence_dims import Dims, Extent, dims
from sp_attention.region.tiled_mlp import fits, keeps_more
from sp_attention.rehearsal.dummy_inputs import DummyBatch
from sp_attention.rehearsal.layer_stacks import StackDraft, dims_of, drafts_of, embedding_of
from sp_attention.rehearsal.trace import AttentionCall, ModuleCall, Trace, Traces, record, same

# How much of a layer runs on whole tensors: only its mixers; what attends too; all of it.
MIXERS, ATTENTION, EVERYTHING = range(3)


@dataclass(frozen=True)
class LayerFindings:
    """A layer as it was found: what is known of it whatever of it is gathered, and what each of its parts is.

    kinds: by the name of a part, what it is. mixers: the parts that are always given whole tensors; attending: the
    children that attend, as parts to gather where sharing out their heads is not exact. piecewise: position-wise
    parts outside of those that keep more for backward than what they are given, such as MLPs and norms.
    """

    layer: Layer
    kinds: Mapping[str, str]
    mixers: tuple[Part, ...]
    attending: tuple[Part, ...]
    piecewise: Mapping[str, nn.Module]
    gathers: int = MIXERS

    def planned(self) -> Layer:
        if self.gathers == EVERYTHING:
            return replace(self.layer, gathered=True, parts=())
        return replace(self.layer, parts=self.mixers + (self.attending if self.gathers == ATTENTION else ()))


@dataclass(frozen=True)
class Findings:
    """What was found in a model.

    stacks: by name, the layers in the order of their calls. idle: the lists of position-wise modules, which can be
    shared out where nothing else can. separate: the stacks between whose layers the model works.
    extents: the narrow extent of each stack. left_alone: the lists of modules that are no stack, and why.
    models: those around the stacks, outermost first; arguments: the tensor arguments that each was given.
    embeddings: those of stacks, of which each rank can look up its own tokens only.
    """

    stacks: Mapping[str, tuple[LayerFindings, ...]]
    idle: Mapping[str, tuple[LayerFindings, ...]]
    separate: frozenset[str]
    extents: Mapping[str, Extent]
    left_alone: Mapping[str, str]
    models: tuple[PreTrainedModel, ...]
    arguments: Mapping[nn.Module, frozenset[str]]
    cross_attention: frozenset[nn.Module]
    embeddings: Mapping[str, Embedding]

    @property
    def shares_nothing(self) -> bool:
        """Every layer does all of its work on whole tensors and hands on whole ones."""
        return all(
            (name in self.separate or len(layers) == 1) and all(found.gathers == EVERYTHING for found in layers)
            for name, layers in self.stacks.items()
        )

    def planned(self) -> tuple[Stack, ...]:
        return tuple(
            Stack(name, tuple(found.planned() for found in layers), name in self.separate, self.embeddings.get(name))
            for name, layers in self.stacks.items()
        )


def report(findings: Findings) -> list[str]:
    """What each part of each kind of layer does, as lines of text."""
    lines = [f"  {embedding.name}: looks up this rank's tokens" for embedding in findings.embeddings.values()]
    for name, layers in findings.stacks.items():
        where = "; each layer cuts and gathers on its own" if name in findings.separate else ""
        alike: dict[str, list[str]] = {}
        for found in layers:
            alike.setdefault("\n".join(_described(found)), []).append(found.layer.name.rsplit(".", 1)[-1])
        for text, which in alike.items():
            lines += [f"  {name}, layers {', '.join(which)}{where}:", text]
    alone = sorted(findings.left_alone.items())
    return lines + [f"  {name}: left alone: {why}" for name, why in alone if name not in findings.stacks]


def _described(found: LayerFindings) -> list[str]:
    if found.gathers == EVERYTHING:
        return ["    all of it: gathered: only as a whole does it give the same numbers"]
    gathered = {part.name for part in found.attending} if found.gathers == ATTENTION else set()
    kinds = {
        name: kind
        for name, kind in found.kinds.items()
        if not any(name == part or name.startswith(f"{part}.") for part in gathered)
    }
    kinds |= dict.fromkeys(gathered, "gathered: attends, and only as a whole gives the same numbers")
    return [f"    {name.removeprefix(found.layer.name + '.')}: {kind}" for name, kind in sorted(kinds.items())]


def explore(
    model: PreTrainedModel,
    pairs: list[tuple[DummyBatch, DummyBatch]],
    attention_calls: list[AttentionCall],
    *,
    proves: bool,
    attends: bool,
) -> tuple[Findings, Traces]:
    """Find the stacks of a model and what their parts are, from pairs of a narrow and a wide dummy batch of one kind.

    Unless it `proves`, what does not attend is taken to be position-wise. Raises UnsupportedError when there is nothing
    that works on a sequence, and when the model should attend through us and does not.
    """
    runs: Traces = []
    position_wise: dict[nn.Module, bool] = {}
    for narrow, wide in reversed(pairs):
        other = record(model, wide, attention_calls)
        if attends and not other.attention_calls:
            raise UnsupportedError(f"{type(model).__name__} does not attend through transformers' attention interface")
        # Proven on the first kind, which has padding, while it is recorded: the other kinds have told the stacks.
        prove = _Proof(drafts_of(model, runs)[0], other, position_wise) if proves and runs else None
        runs.insert(0, (record(model, narrow, attention_calls, prove), other))
    names = {module: name for name, module in model.named_modules()}
    drafts, left_alone = drafts_of(model, runs)
    if proves:
        rest = _Proof(drafts, runs[0][1], position_wise)
        if not rest.suspects.keys() <= position_wise.keys():
            record(model, pairs[0][0], attention_calls, rest)
    stacks: dict[str, tuple[LayerFindings, ...]] = {}
    idle: dict[str, tuple[LayerFindings, ...]] = {}
    for draft in drafts:
        if proves and not draft.attends and all(position_wise.get(layer.module, True) for layer in draft.layers):
            left_alone[draft.name] = "position-wise"
            if any(parameter.dim() > 1 for layer in draft.layers for parameter in layer.module.parameters()):
                idle[draft.name] = tuple(_found(layer, draft, names, runs, position_wise) for layer in draft.layers)
            continue
        stacks[draft.name] = tuple(_found(layer, draft, names, runs, position_wise) for layer in draft.layers)
    if not stacks:
        lists = "; ".join(f"{name}: {why}" for name, why in left_alone.items())
        raise UnsupportedError(
            f"{type(model).__name__} has no stack of layers that hand on a sequence, so there is nothing to share out "
            f"({lists or 'it has no list of modules'})"
        )
    hooked = {found.layer.module for layers in stacks.values() for found in layers}
    models = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and not hooked.isdisjoint(module.modules())
    ]
    findings = Findings(
        stacks,
        idle,
        frozenset(draft.name for draft in drafts if draft.separate),
        {draft.name: draft.extents[0] for draft in drafts},
        {name: why for name, why in left_alone.items() if not name.startswith(tuple(f"{stack}." for stack in stacks))},
        tuple(models),
        {one: frozenset().union(*(_given(one, run) for pair in runs for run in pair)) for one in models},
        frozenset(module for draft in drafts for module, mode in draft.modes.items() if mode == "cross-attention"),
        _embeddings([draft for draft in drafts if draft.name in stacks], runs, names) if proves else {},
    )
    return findings, runs


def _embeddings(drafts: list[StackDraft], runs: Traces, names: Mapping[nn.Module, str]) -> dict[str, Embedding]:
    every = [run for pair in runs for run in pair]
    found = {draft.name: embedding_of(draft.layers[0], every, names) for draft in drafts if not draft.separate}
    return {name: embedding for name, embedding in found.items() if embedding is not None}


class _Proof:
    """Called with every call of a module in a narrow run: proves that the parts of the stacks are position-wise.

    suspects: each part of each layer, and each layer in which nothing attends, with the extents of its stack. results:
    of those that were called, whether they are.
    """

    def __init__(self, drafts: list[StackDraft], wide: Trace, results: dict[nn.Module, bool]) -> None:
        self.suspects: dict[nn.Module, tuple[Extent, Extent]] = {}
        for draft in drafts:
            for layer in draft.layers:
                for part in _parts(layer.module, set(draft.modes)):
                    self.suspects[part] = draft.extents
                if not draft.attends:
                    self.suspects[layer.module] = draft.extents
        self.wide, self.results = wide, results
        self.done = dict.fromkeys(self.suspects, 0)

    def __call__(self, module: nn.Module, called: ModuleCall) -> None:
        if module not in self.suspects or not self.results.get(module, True):
            return
        others, index = self.wide.calls[module], self.done[module]
        self.done[module] += 1
        self.results[module] = index < len(others) and _is_position_wise(
            module, called, others[index], self.suspects[module]
        )


def _is_position_wise(module: nn.Module, called: ModuleCall, other: ModuleCall, extents: tuple[Extent, Extent]) -> bool:
    """Whether a module gives for some tokens alone what it gives for them within the sequence."""
    into, out = dims(called.inputs, other.inputs, *extents), dims(called.output, other.output, *extents)
    length = extents[0].length
    for start, stop in ((length - 1, length), (0, length // 2), (length // 2, length)):

        def alone(tree: Any, along: Dims, start: int = start, stop: int = stop) -> Any:
            def cut(path: Path, leaf: Any) -> Any:
                found = along.get(path)
                if found is not None:
                    return found.cut(leaf, start, stop, extents[0])
                # A copy, since a recurrent module may write into a state that it is given.
                return leaf.clone() if isinstance(leaf, Tensor) else leaf

            return map_leaves(cut, tree)

        args, kwargs = alone(called.inputs, into)
        try:
            result = module(*args, **kwargs)
        except Exception:  # whatever a strange module raises when it is given fewer tokens
            return False
        if not same(result, alone(called.output, out)):
            return False
    return True


def _found(
    layer: Layer,
    draft: StackDraft,
    names: Mapping[nn.Module, str],
    runs: Traces,
    position_wise: Mapping[nn.Module, bool],
) -> LayerFindings:
    """What the parts of a layer are, and which are gathered."""
    kinds: dict[str, str] = {}
    mixers: list[Part] = []
    attending: list[Part] = []
    piecewise: dict[str, nn.Module] = {}
    everything = False
    for module in layer.module.modules():
        mode = draft.modes.get(module)
        if mode is not None:
            kinds[names[module]] = {
                "shared": "head-parallel",
                "cross-attention": "attends from this rank's tokens to all of another sequence",
            }.get(mode, "gathered: attends to something else than the sequence")
    others = {module for module, mode in draft.modes.items() if mode == "other"}
    for child in _children(layer.module):
        attends = set(draft.modes).intersection(child.modules())
        if attends:
            part = _part(child, names, runs, draft)
            if part is None or others.intersection(child.modules()):
                everything |= part is None
                mixers += [part] if part is not None else []
                continue
            attending.append(replace(part, attends=True))
        for module in _parts_of(child, set(draft.modes)):
            if not runs[0][0].calls[module]:
                # If it is called after all, it is refused for what it is given.
                mixers.append(Part(names[module], module, {}, {}))
                continue
            if position_wise.get(module, True):
                kinds[names[module]] = "position-wise"
                calls = runs[0][0].calls[module]
                if not attends and keeps_more(module) and all(fits(call.inputs, call.output) for call in calls):
                    piecewise[names[module]] = module
                continue
            kinds[names[module]] = "gathered: mixes tokens"
            part = _part(module, names, runs, draft)
            everything |= part is None
            mixers += [part] if part is not None else []
    everything |= layer.module in others
    layer = replace(layer, heads=draft.heads_in(layer.module))
    return LayerFindings(layer, kinds, tuple(mixers), tuple(attending), piecewise, EVERYTHING if everything else MIXERS)


def _part(module: nn.Module, names: Mapping[nn.Module, str], runs: Traces, draft: StackDraft) -> Part | None:
    """A part to gather; None when its calls disagree on where the sequence is."""
    arguments = dims_of(module, runs, draft.extents, lambda call: call.inputs)
    results = dims_of(module, runs, draft.extents, lambda call: call.output)
    return None if arguments is None or results is None else Part(names[module], module, arguments, results)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, and of its containers, which are never called."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child)
        else:
            yield child


def _parts(module: nn.Module, attending: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest parts of a module in which nothing attends."""
    for child in _children(module):
        yield from _parts_of(child, attending)


def _parts_of(child: nn.Module, attending: set[nn.Module]) -> Iterator[nn.Module]:
    if attending.intersection(child.modules()):
        yield from _parts(child, attending)
    else:
        yield child


def _given(model: nn.Module, run: Trace) -> frozenset[str]:
    """The names of the tensors that a model was given."""
    return frozenset().union(*(tensor_names(named_arguments(model, *call.inputs)) for call in run.calls[model]))
