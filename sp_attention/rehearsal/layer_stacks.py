"""Stacks: lists of modules that hand a sequence from one to the next; what they are given, return, and attend to."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sp_attention.errors import Refused
from sp_attention.region.flags import flags_of_calls, names_of_arguments
from sp_attention.region.kv_cache import HeadCounts
from sp_attention.region.masks import Described
from sp_attention.region.plan import Embedding, Layer
from sp_attention.region.pytree import Path, leaf_at, leaves, tensors
from sp_attention.region.sequence_dims import Dims, Extent, dims, merged
from sp_attention.rehearsal.trace import ModuleCall, Trace, Traces


def drafts_of(model: nn.Module, traces: Traces) -> tuple[list["StackDraft"], dict[str, str]]:
    """The stacks of a model, outermost first, and why the other lists of modules are none."""
    names = {module: name for name, module in model.named_modules()}
    found: list[StackDraft] = []
    left_alone: dict[str, str] = {}
    for name, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and not any(name.startswith(f"{draft.name}.") for draft in found):
            draft = _draft(name, modules, names, traces)
            if isinstance(draft, Refused):
                left_alone[name] = draft.reason
            else:
                found.append(draft)
    return found, left_alone


@dataclass(frozen=True)
class StackDraft:
    """A stack before anything is proven.

    extents: those of the narrow and the wide traces. modes: for what attends in it through our function, whether keys
    and queries are both the sequence ("shared"), the keys another ("cross-attention"), or neither ("other"). heads: of
    these, how many attend to how many.
    """

    name: str
    layers: tuple[Layer, ...]
    extents: tuple[Extent, Extent]
    modes: Mapping[nn.Module, str]
    heads: Mapping[nn.Module, tuple[int, int]]
    separate: bool

    def heads_in(self, layer: nn.Module) -> HeadCounts:
        """How many heads attend to how many in a layer, by the kind of attention; 0 where that does not tell."""
        found: dict[tuple[bool, int], set[int]] = {}
        for module in layer.modules():
            if module in self.heads:
                queries, keys = self.heads[module]
                found.setdefault((self.modes[module] == "cross-attention", keys), set()).add(queries)
        return {kind: queries.pop() if len(queries) == 1 else 0 for kind, queries in found.items()}

    @property
    def attends(self) -> bool:
        return bool(self.modes)


def _draft(name: str, modules: nn.ModuleList, names: Mapping[nn.Module, str], traces: Traces) -> StackDraft | Refused:
    """The list of modules as a stack of layers, or why it is none."""
    narrow, wide = traces[0]
    called = [module for module in dict.fromkeys(modules) if narrow.calls.get(module)]
    if not called:
        return Refused("not called in the rehearsal")
    first = min(called, key=lambda module: narrow.calls[module][0].order)
    start = _hidden(first, narrow, wide)
    if start is None:
        return Refused("no sequence goes through it")
    extents = start[1]
    layers: list[Layer] = []
    for module in sorted(called, key=lambda module: narrow.calls[module][0].order):
        arguments = dims_of(module, traces, extents, lambda call: call.inputs)
        results = dims_of(module, traces, extents, lambda call: call.output)
        begin = _hidden(module, narrow, wide)
        if begin is None or arguments is None or results is None or arguments.get(begin[0]) is None:
            return Refused(f"{names[module]} is called in ways that do not agree on where the sequence is")
        if begin[1] != extents or not any(results.values()):
            return Refused("its modules do not hand on one sequence")
        masks = frozenset(
            path
            for pair in traces
            for trace in pair
            for call in trace.calls[module]
            for path, leaf in leaves(call.inputs)
            if isinstance(leaf, Described)
        )
        calls = [call.inputs for pair in traces for trace in pair for call in trace.calls[module]]
        layers.append(
            Layer(
                names[module],
                module,
                begin[0],
                frozenset(),
                arguments,
                frozenset(),
                results,
                (),
                masks,
                flags=flags_of_calls(module, calls),
                names=names_of_arguments(module),
            )
        )
    modes = _modes(layers, narrow, wide, extents)
    heads = {one.module: one.heads for one in narrow.attention_calls if one.module in modes}
    return _handing_over(StackDraft(name, tuple(layers), extents, modes, heads, False), traces)


def _hidden(module: nn.Module, narrow: Trace, wide: Trace) -> tuple[Path, tuple[Extent, Extent]] | None:
    """The path of a layer's hidden states [.., B, S, E], and B and S in both traces: its first such float argument."""
    if not narrow.calls[module] or not wide.calls[module]:
        return None
    here, there = narrow.dummy, wide.dummy
    others = dict(tensors(wide.calls[module][0].inputs))
    lengths = [(here.extent.length, there.extent.length), (here.encoder_length, there.encoder_length)]
    for path, tensor in tensors(narrow.calls[module][0].inputs):
        other = others.get(path)
        if other is None or other.dim() != tensor.dim() or tensor.dim() < 3 or not tensor.is_floating_point():
            continue
        pairs = list(zip(tensor.shape, other.shape, strict=True))
        rows = (here.extent.batch, there.extent.batch)
        if rows not in pairs:
            continue
        # The sequence is one that the dummy batches have, or else what follows the batch: [B, patches, E].
        after = pairs.index(rows) + 1
        patches = pairs[after] if len(pairs) == 3 and after < 2 else None
        length = next((pair for pair in lengths if pair in pairs), patches)
        if length is not None:
            return path, (Extent(rows[0], int(length[0] or 0)), Extent(rows[1], int(length[1] or 0)))
    return None


def dims_of(
    module: nn.Module, traces: Traces, extents: tuple[Extent, Extent], side: Callable[[ModuleCall], Any]
) -> Dims | None:
    """Where the sequence is in the arguments or the results of all calls of a module; None if calls disagree."""
    return merged(
        [
            dims(side(call), side(other), *extents)
            for narrow, wide in traces
            for call, other in zip(narrow.calls[module], wide.calls[module], strict=False)
        ]
    )


def _modes(layers: list[Layer], narrow: Trace, wide: Trace, extents: tuple[Extent, Extent]) -> dict[nn.Module, str]:
    within = {module for layer in layers for module in layer.module.modules()}
    sequence = ((extents[0].batch, extents[0].length), (extents[1].batch, extents[1].length))
    modes: dict[nn.Module, str] = {}
    for one, other in zip(narrow.attention_calls, wide.attention_calls, strict=False):
        if one.module not in within:
            continue
        mode = "other"
        if one.module is other.module and (one.queries, other.queries) == sequence:
            mode = "shared" if (one.keys, other.keys) == sequence else "cross-attention"
        modes[one.module] = mode if modes.get(one.module, mode) == mode else "other"
    return modes


def _handing_over(draft: StackDraft, traces: Traces) -> StackDraft:
    """The draft with what each layer hands to later ones; separate where the next is not given what one returned."""
    separate = any(len(narrow.calls[layer.module]) != 1 for narrow, _ in traces for layer in draft.layers)
    layers: list[Layer] = []
    for i, layer in enumerate(draft.layers):
        handed: set[Path] = set()
        hands: set[Path] = set()
        for narrow, _ in traces if not separate else []:
            call = narrow.calls[layer.module][0]
            earlier = {_identity(tensor) for one in draft.layers[:i] for tensor in _sequences(one, narrow).values()}
            handed |= {path for path, tensor in tensors(call.inputs) if _identity(tensor) in earlier}
            later = [narrow.calls[one.module][0].inputs for one in draft.layers[i + 1 :]]
            taken = {_identity(tensor) for inputs in later for _, tensor in tensors(inputs)}
            hands |= {path for path, tensor in _sequences(layer, narrow).items() if _identity(tensor) in taken}
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


def _identity(tensor: Tensor) -> Hashable:
    """The same for two tensors that are one, or the same memory seen alike.

    An engine may put an autograd function of its own around every layer, which returns its input as a new tensor, as
    ZeRO-3 does. All tensors of a trace are alive together, so that no memory is used twice.
    """
    if type(tensor) is not Tensor or tensor.device.type == "meta":
        return id(tensor)  # It may have no memory of its own.
    return tensor.data_ptr() or id(tensor), tensor.dtype, tensor.shape, tensor.stride()


def _sequences(layer: Layer, trace: Trace) -> dict[Path, Tensor]:
    """What a layer returned that follows the sequence."""
    return {path: tensor for path, tensor in tensors(trace.calls[layer.module][0].output) if layer.results.get(path)}


def embedding_of(layer: Layer, traces: list[Trace], names: Mapping[nn.Module, str]) -> Embedding | None:
    """The embedding that is called once, with the tokens of the batch, and whose result is what a first layer is given.

    None if there is none in one of the traces, or what it does depends on all of its tokens.
    """
    found = {_embedding_in(trace, layer) for trace in traces}
    module = found.pop()
    if found or module is None or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    return Embedding(names[module], module)


def _embedding_in(trace: Trace, layer: Layer) -> nn.Embedding | None:
    hidden = leaf_at(trace.calls[layer.module][0].inputs, layer.hidden)
    makers = [module for module, calls in trace.calls.items() if any(call.output is hidden for call in calls)]
    if len(makers) != 1 or not isinstance(makers[0], nn.Embedding) or len(trace.calls[makers[0]]) != 1:
        return None
    args, kwargs = trace.calls[makers[0]][0].inputs
    are_tokens = len(args) == 1 and not kwargs and any(args[0] is given for given in trace.dummy.inputs.values())
    return makers[0] if are_tokens else None
