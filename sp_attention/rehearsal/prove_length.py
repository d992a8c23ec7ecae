"""Prove that what was found of layers with a handful of tokens holds for long sequences.

Some behaviour begins beyond a length: experts with a capacity, windows and blocks that are full, scales by position.
Each kind of layer is tried at a length beyond every number in the configuration that may be such a threshold.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from sp_attention.region.context import Context
from sp_attention.region.few_tokens import FewTokens
from sp_attention.region.locality import NotLocal, Sample, length_for, not_local
from sp_attention.region.plan import NEVER_CUT, Layer
from sp_attention.region.sequence_dims import Extent
from sp_attention.rehearsal.findings import ATTENTION, EVERYTHING, POSITION_WISE, LayerFindings
from sp_attention.rehearsal.trace import Trace

# Nothing of a configuration that is larger is taken for a threshold, and no layer is tried with fewer tokens.
_LARGEST, _LEAST = 16_384, 512
# What configurations call widths, and ids of tokens.
_WIDTHS = {"vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "d_model", "d_ff"}

# What a layer is, if these parts of it are given whole tensors besides those that have to be.
Find = Callable[[frozenset[nn.Module]], LayerFindings]


def length_beyond(settings: Mapping[str, Any]) -> int:
    """A number of tokens beyond every number of a configuration that may be a length at which behaviour changes."""
    most = max((number for number in _numbers(settings) if number <= _LARGEST), default=0)
    return length_for(max(_LEAST, 5 * most // 4 + 64))


def _numbers(settings: Any, name: str = "") -> Iterator[int]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _numbers(value, str(key))
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from _numbers(value, name)
    elif type(settings) is int and name not in _WIDTHS and "token_i" not in name:
        yield settings


@dataclass
class LongProof:
    """Tries layers at a length, each kind of them once.

    done: by kind, the names of parts that mix tokens at this length, and how much of the layer is gathered for it.
    samples: of each kind that was tried one, as it is sharded now.
    """

    narrow: Trace
    wide: Trace
    length: int
    settings: Mapping[str, Any]
    context: Context
    done: dict[str, tuple[frozenset[str], int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def __call__(self, layer: Layer, extents: tuple[Extent, Extent], find: Find) -> LayerFindings:
        """What a layer is, at this length too."""
        parts = dict(layer.module.named_modules())
        kind = _kind_of(layer.module, self.settings, find(frozenset()))
        if kind not in self.done:
            mixers, gathers = self._tried(layer, extents, find)
            self.done[kind] = frozenset(name for name, part in parts.items() if part in mixers), gathers
        names, gathers = self.done[kind]
        found = find(frozenset(parts[name] for name in names))
        return replace(found, gathers=max(found.gathers, gathers))

    def _tried(self, layer: Layer, extents: tuple[Extent, Extent], find: Find) -> tuple[frozenset[nn.Module], int]:
        """The parts of a layer that mix tokens at this length, and how much of the layer is gathered for it."""
        mixers: frozenset[nn.Module] = frozenset()
        gathers = 0
        while True:
            found = find(mixers)
            gathers = max(found.gathers, gathers)
            if gathers == EVERYTHING:
                return mixers, gathers
            sample = self._sample(replace(found, gathers=gathers), extents)
            problem = self._problem(sample)
            if not problem:
                self.samples.append(sample)
                return mixers, gathers
            if problem.parts:
                mixers |= problem.parts
            elif found.sharing:
                # Those that hand other things to their functions, or else all of them.
                handing = [one for one in found.sharing if not problem.attending.isdisjoint(one.module.modules())]
                mixers |= {one.module for one in handing or found.sharing}
            else:
                gathers = ATTENTION if gathers < ATTENTION and found.attending else EVERYTHING

    def _problem(self, sample: Sample) -> NotLocal:
        modes = (
            not_local(sample, self.length, self.context, trains=trains, dtype=sample.dtype) for trains in (False, True)
        )
        return next(filter(None, modes), NotLocal())

    def _sample(self, found: LayerFindings, extents: tuple[Extent, Extent]) -> Sample:
        layer = found.planned()
        parts = tuple(
            module
            for name, module in layer.module.named_modules()
            if found.kinds.get(f"{layer.name}.{name}") == POSITION_WISE
        )
        call, other = (trace.calls[layer.module][0] for trace in (self.narrow, self.wide))
        few = FewTokens.of(call.inputs, other.inputs, *extents)
        cut = {path: dims for path, dims in few.lengths.items() if path[1] not in NEVER_CUT}
        outputs = {
            module: [
                FewTokens.of(call.output, other.output, *extents)
                for call, other in zip(self.narrow.calls[module], self.wide.calls[module], strict=False)
            ]
            for module in (*parts, *(one.module for one in (*found.mixers, *found.attending)))
        }
        return Sample(layer, parts, replace(few, lengths=cut), outputs).planned(layer)


def _kind_of(layer: nn.Module, settings: Mapping[str, Any], found: LayerFindings) -> str:
    """The same for layers that do the same: of the same parts, with the same settings but for their number."""
    number = next((value for part in layer.modules() if type(value := vars(part).get("layer_idx")) is int), None)
    lists = [value for value in settings.values() if isinstance(value, (list, tuple))]
    mine = [values[number] for values in lists if number is not None and number < len(values)]
    parts = [(name, type(part).__qualname__, _settings_of(part)) for name, part in layer.named_modules()]
    shapes = [(name, tuple(getattr(one, "ds_shape", one.shape))) for name, one in layer.named_parameters()]
    kinds = sorted((name.removeprefix(found.layer.name), kind) for name, kind in found.kinds.items())
    return repr((mine, parts, shapes, kinds))


def _settings_of(module: nn.Module) -> list[tuple[str, Any]]:
    attributes = vars(module).items()
    return [(name, one) for name, one in attributes if name != "layer_idx" and isinstance(one, (bool, int, float, str))]
