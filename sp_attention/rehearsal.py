"""Tiny forwards in enable() that find the stacks of layers, and what each part of a layer is.

There is no table of model names. Two forwards of different batch and length tell which dims are the sequence. What
attends through transformers' attention interface can be head-parallel; a part is position-wise if it gives for some
tokens alone what it gives for them within the sequence; anything else is a mixer, and is given whole tensors.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import PreTrainedModel

from sp_attention.attention import Mask
from sp_attention.dims import Dims, Extent, dims, merged
from sp_attention.errors import UnsupportedError
from sp_attention.region import Layer, Part, Stack, named_arguments, tensor_names
from sp_attention.specimens import Specimen
from sp_attention.trees import Path, map_leaves, tensors

# Largest difference, relative to the largest number, of two computations of the same thing: the order of sums
# differs, and models compute parts in float32 whatever their dtype.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 5e-2

# How much of a layer runs on whole tensors: only its mixers; what attends too; all of it.
MIXERS, ATTENTION, EVERYTHING = range(3)


@dataclass(frozen=True)
class Attended:
    """One call of our attention function: by which module, [B, S] of its queries and of its keys, and when."""

    module: nn.Module
    queries: tuple[int, int]
    keys: tuple[int, int]


@dataclass(frozen=True)
class Called:
    """One call of a module: its arguments as (args, kwargs), its output, and its place among all calls."""

    inputs: Any
    output: Any
    order: int


@dataclass(frozen=True)
class Run:
    """A forward on one specimen: its output, the calls of every module, and those of our attention function."""

    specimen: Specimen
    output: Any
    calls: Mapping[nn.Module, list[Called]]
    attended: list[Attended]


Runs = list[tuple[Run, Run]]


@dataclass(frozen=True)
class Found:
    """A layer as it was found: what is known of it whatever of it is gathered, and what each of its parts is.

    kinds: by the name of a part, what it is. mixers: the parts that are always given whole tensors; attending: the
    children that attend, as parts to gather where sharing out their heads is not exact.
    """

    layer: Layer
    kinds: Mapping[str, str]
    mixers: tuple[Part, ...]
    attending: tuple[Part, ...]
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
    """

    stacks: Mapping[str, tuple[Found, ...]]
    idle: Mapping[str, tuple[Found, ...]]
    separate: frozenset[str]
    extents: Mapping[str, Extent]
    left_alone: Mapping[str, str]
    models: tuple[PreTrainedModel, ...]
    arguments: Mapping[nn.Module, frozenset[str]]
    over_memory: frozenset[nn.Module]

    @property
    def shares_nothing(self) -> bool:
        """Every layer does all of its work on whole tensors and hands on whole ones."""
        return all(
            (name in self.separate or len(layers) == 1) and all(found.gathers == EVERYTHING for found in layers)
            for name, layers in self.stacks.items()
        )

    def planned(self) -> tuple[Stack, ...]:
        return tuple(
            Stack(name, tuple(found.planned() for found in layers), name in self.separate)
            for name, layers in self.stacks.items()
        )


def report(findings: Findings) -> list[str]:
    """What each part of each kind of layer does, as lines of text."""
    lines = []
    for name, layers in findings.stacks.items():
        where = "; each layer cuts and gathers on its own" if name in findings.separate else ""
        alike: dict[str, list[str]] = {}
        for found in layers:
            alike.setdefault("\n".join(_described(found)), []).append(found.layer.name.rsplit(".", 1)[-1])
        for text, which in alike.items():
            lines += [f"  {name}, layers {', '.join(which)}{where}:", text]
    alone = sorted(findings.left_alone.items())
    return lines + [f"  {name}: left alone: {why}" for name, why in alone if name not in findings.stacks]


def _described(found: Found) -> list[str]:
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


def _just_called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run what is inside without gradients or checkpointing; modes, buffers and random numbers stay as they were."""
    training = {module: module.training for module in model.modules()}
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    wrapped = [(module, module.checkpoint_fn) for module in model.modules() if isinstance(module, CheckpointWrapper)]
    randomness = random.getstate()
    device = next(model.parameters()).device
    fork = {} if device.type in ("cpu", "meta") else {"devices": [device], "device_type": device.type}
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]  # a flag, not a module
        for wrapper, _ in wrapped:
            wrapper.checkpoint_fn = _just_called  # type: ignore[assignment]  # a partial of torch's checkpoint else
        with torch.no_grad(), torch.random.fork_rng(**{"devices": [], **fork}), same_buffers(model):
            yield
    finally:
        random.setstate(randomness)
        for module, mode in training.items():
            module.training = mode
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]  # a flag, not a module
        for wrapper, checkpoint in wrapped:
            wrapper.checkpoint_fn = checkpoint


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever is inside leaves the buffers as they are, such as the running means of a batch normalisation."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.device.type != "meta" and not torch.equal(buffer, before):
                    buffer.copy_(before)


def record(
    model: nn.Module,
    specimen: Specimen,
    attended: list[Attended],
    prove: Callable[[nn.Module, Called], None] | None = None,
) -> Run:
    """A forward that records the calls of all modules; `attended` is the list that our attention function appends to.

    `prove` is told of each call right after it, while an engine that shards parameters still has them gathered.
    """
    calls: dict[nn.Module, list[Called]] = {module: [] for module in model.modules()}
    attended.clear()
    count = 0
    proving = False

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal proving, count
        if proving:
            return
        count += 1
        called = Called((args, dict(kwargs)), output, count)
        calls[module].append(called)
        if prove is not None:
            proving = True
            prove(module, called)
            proving = False

    handles = [module.register_forward_hook(after, with_kwargs=True) for module in calls]
    try:
        output = model(**specimen.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Run(specimen, output, calls, list(attended))


def explore(
    model: PreTrainedModel,
    pairs: list[tuple[Specimen, Specimen]],
    attended: list[Attended],
    *,
    proves: bool,
    attends: bool,
) -> tuple[Findings, Runs]:
    """Find the stacks of a model and what their parts are, from pairs of a narrow and a wide specimen of one kind.

    Unless it `proves`, what does not attend is taken to be position-wise. Raises UnsupportedError when there is nothing
    that works on a sequence, and when the model should attend through us and does not.
    """
    runs: Runs = []
    position_wise: dict[nn.Module, bool] = {}
    for narrow, wide in reversed(pairs):
        other = record(model, wide, attended)
        if attends and not other.attended:
            raise UnsupportedError(f"{type(model).__name__} does not attend through transformers' attention interface")
        # Proven on the first kind, which has padding, while it is recorded: the other kinds have told the stacks.
        prove = _Proof(_drafts(model, runs)[0], other, position_wise) if proves and runs else None
        runs.insert(0, (record(model, narrow, attended, prove), other))
    names = {module: name for name, module in model.named_modules()}
    drafts, left_alone = _drafts(model, runs)
    if proves:
        rest = _Proof(drafts, runs[0][1], position_wise)
        if not rest.suspects.keys() <= position_wise.keys():
            record(model, pairs[0][0], attended, rest)
    stacks: dict[str, tuple[Found, ...]] = {}
    idle: dict[str, tuple[Found, ...]] = {}
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
    models = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and any(found.layer.module in set(module.modules()) for layers in stacks.values() for found in layers)
    ]
    findings = Findings(
        stacks,
        idle,
        frozenset(draft.name for draft in drafts if draft.separate),
        {draft.name: draft.extents[0] for draft in drafts},
        {name: why for name, why in left_alone.items() if not name.startswith(tuple(f"{stack}." for stack in stacks))},
        tuple(models),
        {one: frozenset().union(*(_given(one, run) for pair in runs for run in pair)) for one in models},
        frozenset(module for draft in drafts for module, mode in draft.modes.items() if mode == "over memory"),
    )
    return findings, runs


def _drafts(model: nn.Module, runs: Runs) -> tuple[list["_Draft"], dict[str, str]]:
    """The stacks of a model, outermost first, and why the other lists of modules are none."""
    names = {module: name for name, module in model.named_modules()}
    drafts: list[_Draft] = []
    left_alone: dict[str, str] = {}
    for name, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and not any(name.startswith(f"{draft.name}.") for draft in drafts):
            draft = _draft(name, modules, names, runs)
            if isinstance(draft, str):
                left_alone[name] = draft
            else:
                drafts.append(draft)
    return drafts, left_alone


@dataclass(frozen=True)
class _Draft:
    """A stack before anything is proven.

    extents: those of the narrow and the wide runs. modes: for what attends in it through our function, whether keys
    and queries are both the sequence ("shared"), the keys another ("over memory"), or neither ("other").
    """

    name: str
    layers: tuple[Layer, ...]
    extents: tuple[Extent, Extent]
    modes: Mapping[nn.Module, str]
    separate: bool

    @property
    def attends(self) -> bool:
        return bool(self.modes)


def _draft(name: str, modules: nn.ModuleList, names: Mapping[nn.Module, str], runs: Runs) -> _Draft | str:
    """The list of modules as a stack of layers, or why it is none."""
    narrow, wide = runs[0]
    called = [module for module in dict.fromkeys(modules) if narrow.calls.get(module)]
    if not called:
        return "not called in the rehearsal"
    first = min(called, key=lambda module: narrow.calls[module][0].order)
    start = _hidden(first, narrow, wide)
    if start is None:
        return "no sequence goes through it"
    extents = start[1]
    layers: list[Layer] = []
    for module in sorted(called, key=lambda module: narrow.calls[module][0].order):
        arguments = _dims_of(module, runs, extents, lambda call: call.inputs)
        results = _dims_of(module, runs, extents, lambda call: call.output)
        begin = _hidden(module, narrow, wide)
        if begin is None or arguments is None or results is None or arguments.get(begin[0]) is None:
            return f"{names[module]} is called in ways that do not agree on where the sequence is"
        if begin[1] != extents or not any(results.values()):
            return "its modules do not hand on one sequence"
        masks = frozenset(
            path
            for pair in runs
            for run in pair
            for call in run.calls[module]
            for path, leaf in _leaves(call.inputs)
            if isinstance(leaf, Mask)
        )
        layers.append(Layer(names[module], module, begin[0], frozenset(), arguments, frozenset(), results, (), masks))
    return _handing_over(_Draft(name, tuple(layers), extents, _modes(layers, narrow, wide, extents), False), runs)


def _hidden(module: nn.Module, narrow: Run, wide: Run) -> tuple[Path, tuple[Extent, Extent]] | None:
    """The path of a layer's hidden states [.., B, S, E], and B and S in both runs: its first such float argument."""
    if not narrow.calls[module] or not wide.calls[module]:
        return None
    here, there = narrow.specimen, wide.specimen
    others = dict(tensors(wide.calls[module][0].inputs))
    lengths = [(here.extent.length, there.extent.length), (here.memory, there.memory)]
    for path, tensor in tensors(narrow.calls[module][0].inputs):
        other = others.get(path)
        if other is None or other.dim() != tensor.dim() or tensor.dim() < 3 or not tensor.is_floating_point():
            continue
        pairs = list(zip(tensor.shape, other.shape, strict=True))
        rows = (here.extent.batch, there.extent.batch)
        if rows not in pairs:
            continue
        # The sequence is one that the specimens have, or else what follows the batch: [B, patches, E].
        after = pairs.index(rows) + 1
        patches = pairs[after] if len(pairs) == 3 and after < 2 else None
        length = next((pair for pair in lengths if pair in pairs), patches)
        if length is not None:
            return path, (Extent(rows[0], int(length[0] or 0)), Extent(rows[1], int(length[1] or 0)))
    return None


def _dims_of(
    module: nn.Module, runs: Runs, extents: tuple[Extent, Extent], side: Callable[[Called], Any]
) -> Dims | None:
    """Where the sequence is in the arguments or the results of all calls of a module; None if calls disagree."""
    return merged(
        [
            dims(side(call), side(other), *extents)
            for narrow, wide in runs
            for call, other in zip(narrow.calls[module], wide.calls[module], strict=False)
        ]
    )


def _modes(layers: list[Layer], narrow: Run, wide: Run, extents: tuple[Extent, Extent]) -> dict[nn.Module, str]:
    within = {module for layer in layers for module in layer.module.modules()}
    sequence = ((extents[0].batch, extents[0].length), (extents[1].batch, extents[1].length))
    modes: dict[nn.Module, str] = {}
    for one, other in zip(narrow.attended, wide.attended, strict=False):
        if one.module not in within:
            continue
        mode = "other"
        if one.module is other.module and (one.queries, other.queries) == sequence:
            mode = "shared" if (one.keys, other.keys) == sequence else "over memory"
        modes[one.module] = mode if modes.get(one.module, mode) == mode else "other"
    return modes


def _handing_over(draft: _Draft, runs: Runs) -> _Draft:
    """The draft with what each layer hands to later ones; separate where the next is not given what one returned."""
    separate = any(len(narrow.calls[layer.module]) != 1 for narrow, _ in runs for layer in draft.layers)
    layers: list[Layer] = []
    for i, layer in enumerate(draft.layers):
        handed: set[Path] = set()
        hands: set[Path] = set()
        for narrow, _ in runs if not separate else []:
            call = narrow.calls[layer.module][0]
            earlier = {id(tensor) for one in draft.layers[:i] for tensor in _sequences(one, narrow).values()}
            handed |= {path for path, tensor in tensors(call.inputs) if id(tensor) in earlier}
            taken = {
                id(tensor) for one in draft.layers[i + 1 :] for _, tensor in tensors(narrow.calls[one.module][0].inputs)
            }
            hands |= {path for path, tensor in _sequences(layer, narrow).items() if id(tensor) in taken}
        if i + 1 == len(draft.layers):
            # What the stack hands on to what follows it: as the layers before do.
            hands = {path for one in layers for path in one.hands if layer.results.get(path)} or {
                path for path, found in layer.results.items() if found is not None
            }
        elif not hands:
            separate = True
        if i and layer.hidden not in handed:
            separate = True
        layers.append(replace(layer, handed=frozenset(handed), hands=frozenset(hands)))
    return replace(draft, layers=tuple(layers), separate=separate)


def _sequences(layer: Layer, run: Run) -> dict[Path, Tensor]:
    """What a layer returned that follows the sequence."""
    return {path: tensor for path, tensor in tensors(run.calls[layer.module][0].output) if layer.results.get(path)}


class _Proof:
    """Called with every call of a module in a narrow run: proves that the parts of the stacks are position-wise.

    suspects: each part of each layer, and each layer in which nothing attends, with the extents of its stack. results:
    of those that were called, whether they are.
    """

    def __init__(self, drafts: list[_Draft], wide: Run, results: dict[nn.Module, bool]) -> None:
        self.suspects: dict[nn.Module, tuple[Extent, Extent]] = {}
        for draft in drafts:
            for layer in draft.layers:
                for part in _parts(layer.module, set(draft.modes)):
                    self.suspects[part] = draft.extents
                if not draft.attends:
                    self.suspects[layer.module] = draft.extents
        self.wide, self.results = wide, results
        self.done = dict.fromkeys(self.suspects, 0)

    def __call__(self, module: nn.Module, called: Called) -> None:
        if module not in self.suspects or not self.results.get(module, True):
            return
        others, index = self.wide.calls[module], self.done[module]
        self.done[module] += 1
        self.results[module] = index < len(others) and _is_position_wise(
            module, called, others[index], self.suspects[module]
        )


def _is_position_wise(module: nn.Module, called: Called, other: Called, extents: tuple[Extent, Extent]) -> bool:
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
    layer: Layer, draft: _Draft, names: Mapping[nn.Module, str], runs: Runs, position_wise: Mapping[nn.Module, bool]
) -> Found:
    """What the parts of a layer are, and which are gathered."""
    kinds: dict[str, str] = {}
    mixers: list[Part] = []
    attending: list[Part] = []
    everything = False
    for module in layer.module.modules():
        mode = draft.modes.get(module)
        if mode is not None:
            kinds[names[module]] = {
                "shared": "head-parallel",
                "over memory": "attends from this rank's tokens to all of another sequence",
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
            attending.append(part)
        for module in _parts_of(child, set(draft.modes)):
            if not runs[0][0].calls[module]:
                # If it is called after all, it is refused for what it is given.
                mixers.append(Part(names[module], module, {}, {}))
                continue
            if position_wise.get(module, True):
                kinds[names[module]] = "position-wise"
                continue
            kinds[names[module]] = "gathered: mixes tokens"
            part = _part(module, names, runs, draft)
            everything |= part is None
            mixers += [part] if part is not None else []
    if layer.module in draft.modes:
        everything |= layer.module in others
    return Found(layer, kinds, tuple(mixers), tuple(attending), EVERYTHING if everything else MIXERS)


def _part(module: nn.Module, names: Mapping[nn.Module, str], runs: Runs, draft: _Draft) -> Part | None:
    """A part to gather; None when its calls disagree on where the sequence is."""
    arguments = _dims_of(module, runs, draft.extents, lambda call: call.inputs)
    results = _dims_of(module, runs, draft.extents, lambda call: call.output)
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


def _given(model: nn.Module, run: Run) -> frozenset[str]:
    """The names of the tensors that a model was given."""
    return frozenset().union(*(tensor_names(named_arguments(model, *call.inputs)) for call in run.calls[model]))


def _leaves(tree: Any) -> list[tuple[Path, Any]]:
    found: list[tuple[Path, Any]] = []
    map_leaves(lambda path, leaf: found.append((path, leaf)), tree)
    return found


def same(left: Any, right: Any) -> bool:
    """Whether two outputs hold the same numbers, up to the order of sums."""
    ours, theirs = dict(tensors(left)), dict(tensors(right))
    return ours.keys() == theirs.keys() and all(_close(ours[path], theirs[path]) for path in ours)


def _close(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    # Whatever is not finite in the reference has no value to compare with.
    finite = torch.isfinite(right)
    if not finite.any():
        return True
    tolerance = _TOLERANCE.get(right.dtype, _LOW_PRECISION_TOLERANCE)
    left, right = left[finite].double(), right[finite].double()
    return bool((left - right).abs().max() <= tolerance * right.abs().max())
