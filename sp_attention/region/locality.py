"""Whether a layer does to the tokens of a long sequence what it does to some of them alone, as sharding takes it to.

Nothing is sent for it: a layer is run twice on this rank, on a long sequence and on the later part of it, with a
function of each token in place of attention. What it hands to attention (query, key, value), what its position-wise
parts return and what it returns itself must be the same tokens in both.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sp_attention.distributed import rng
from sp_attention.region.context import Context
from sp_attention.region.few_tokens import FewTokens
from sp_attention.region.harmless_draws import HarmlessDraws
from sp_attention.region.kept import Attributes, Buffers
from sp_attention.region.mixer_calls import run_by_tokens
from sp_attention.region.plan import Layer
from sp_attention.region.pytree import Path, leaf_at, tensors

# Of two computations of a token: the largest difference, relative to the largest number.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 1e-1
# The later part of a sequence is one in so many of its tokens.
_LATER = 4
# Tokens that may differ: a router that is undecided between two experts decides by the order of sums.
_UNDECIDED = 0.01


@dataclass(frozen=True)
class Sample:
    """A layer, what it was given for a few tokens, and what parts of it returned for them.

    parts: its position-wise parts. outputs: what modules returned that may be given whole tensors, in each call.
    """

    layer: Layer
    parts: tuple[nn.Module, ...]
    inputs: FewTokens
    outputs: Mapping[nn.Module, list[FewTokens]]

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states."""
        found: Tensor = leaf_at(self.inputs.tree, self.layer.hidden)
        return found.dtype

    def planned(self, layer: Layer) -> "Sample":
        """The same of the layer as it is planned now: without the parts of what is given whole tensors."""
        inside = {part for whole in layer.gathered_modules for part in whole.module.modules()}
        return replace(self, layer=layer, parts=tuple(part for part in self.parts if part not in inside))


@dataclass(frozen=True)
class NotLocal:
    """What differs: parts of the layer, modules by what they hand to attention, and in the end the layer's results.

    Not parts whose results are as long as something else than the tokens: those cannot be cut to a span.
    error: what was raised instead.
    """

    parts: frozenset[nn.Module] = frozenset()
    attending: frozenset[nn.Module] = frozenset()
    results: bool = False
    error: str = ""

    def __bool__(self) -> bool:
        return bool(self.parts or self.attending or self.results or self.error)


@dataclass
class _Run:
    """What happened in one run: calls of parts as (module, inputs, output), of attention as (module, its tensors).

    Of each tensor what `_told` keeps of it.
    """

    output: Any = None
    parts: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)
    attention: list[tuple[nn.Module, Any]] = field(default_factory=list)


def length_for(tokens: int) -> int:
    """About so many tokens, where that and the length of the later part are hardly a size of anything else."""
    return tokens // (2 * _LATER) * 2 * _LATER + _LATER


def not_local(sample: Sample, length: int, context: Context, *, trains: bool, dtype: torch.dtype) -> NotLocal:
    """What of a layer depends on where in a sequence of `length` tokens, or among how many, its tokens are.

    trains: in training, where what is drawn is harmless. dtype: of the hidden states.
    """
    start = length - length // _LATER
    given = sample.inputs.many(length, sample.dtype, dtype)
    outputs = {
        one.module: [few.many(length, sample.dtype, dtype) for few in sample.outputs[one.module]]
        for one in sample.layer.gathered_modules
        if not one.calls
    }
    later_outputs = {
        module: [few.later(many, length, start) for few, many in zip(sample.outputs[module], results, strict=True)]
        for module, results in outputs.items()
    }

    layer = sample.layer.module
    attributes = Attributes.of(layer)

    def run(given: Any, results: Mapping[nn.Module, list[Any]], length: int) -> _Run:
        for module, its in results.items():
            module.forward = partial(_next, iter(its))
        try:
            return _run(sample, given, length, context)
        finally:
            attributes.restore()

    modes = {one: (one.training, vars(one).get("forward")) for one in layer.modules()}
    buffers, device = Buffers.of(layer), leaf_at(given, sample.layer.hidden).device
    with torch.no_grad(), rng.Forked(0, device), HarmlessDraws():
        layer.train(trains)
        try:
            whole = run(given, outputs, length)
            later = run(sample.inputs.later(given, length, start), later_outputs, length - start)
        except Exception as error:  # whatever a layer raises at what it was not made for
            return NotLocal(error=f"{type(error).__name__}: {error}")
        finally:
            buffers.restore()
            for one, (mode, forward) in modes.items():
                one.training = mode
                vars(one).pop("forward", None)
                if forward is not None:
                    one.forward = forward
    if [module for module, _, _ in whole.parts] != [module for module, _, _ in later.parts]:
        return NotLocal(results=True)
    parts = frozenset(
        module
        for (module, inputs, output), (_, less, result) in zip(whole.parts, later.parts, strict=True)
        if _agree(inputs, less) and not _agree(output, result) and _alike(output, result)
    )
    if [module for module, _ in whole.attention] != [module for module, _ in later.attention]:
        return NotLocal(parts, results=True)
    pairs = zip(whole.attention, later.attention, strict=True)
    attending = frozenset(module for (module, one), (_, other) in pairs if not _agree(one, other))
    return NotLocal(parts, attending, not _agree(whole.output, later.output))


def _run(sample: Sample, given: Any, length: int, context: Context) -> _Run:
    """The layer, without what is hooked to it, on these tokens."""
    run, (args, kwargs) = _Run(), given

    def attend(module: nn.Module, *given: Tensor) -> Tensor:
        run.attention.append((module, _told(given, length)))
        return _of_each_token(*given)

    def look(module: nn.Module, given: Mapping[str, Tensor]) -> None:
        run.attention.append((module, _told(dict(given), length)))

    for calls in sample.layer.mixer_calls:
        run_by_tokens(calls, look)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run.parts.append((module, _told((args, kwargs), length), _told(output, length)))

    with ExitStack() as hooks:
        for module in sample.parts:
            hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        with context.alone(attend):
            run.output = _told(sample.layer.module.forward(*args, **kwargs), length)
    return run


def _of_each_token(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, H, s, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv] → [B, s, H, Dv]: in place of attention, of each token alone."""
    out = query.mean(-1, keepdim=True).expand(*query.shape[:-1], value.shape[-1])
    if key.shape[2] == query.shape[2]:
        out = out + (key.mean(-1, keepdim=True) + value).mean(1, keepdim=True)
    return out.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class _Told:
    """What is compared of a tensor: a few numbers of each token, [s, 8], or [1, 8] of a tensor without tokens.

    kind: its dtype, and its shape without s. tolerance: of the largest difference, relative to the largest number.
    """

    numbers: Tensor
    kind: Any
    tolerance: float


def _told(tree: Any, length: int) -> dict[Path, _Told]:
    return {path: _numbers_of(tensor, length) for path, tensor in tensors(tree)}


def _numbers_of(tensor: Tensor, length: int) -> _Told:
    tolerance = _TOLERANCE.get(tensor.dtype, _LOW_PRECISION_TOLERANCE)
    shape, dtype = tuple(tensor.shape), tensor.dtype
    tensor = tensor.movedim(shape.index(length), 0).flatten(1) if length in shape else tensor.reshape(1, -1)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    tensor = torch.nan_to_num(tensor.to(kept), nan=0.5, posinf=1.0, neginf=-1.0)
    # Sums of the numbers with weights that nothing in a model follows.
    weights = torch.arange(8 * tensor.shape[1], device=tensor.device).mul(2.399).cos().to(kept).view(-1, 8)
    return _Told(tensor @ weights, (dtype, ["s" if size == length else size for size in shape]), tolerance)


def _agree(whole: dict[Path, _Told], later: dict[Path, _Told]) -> bool:
    """Whether what was told of the later tokens is what was told of them within the whole; not of attention weights."""
    weights = {path for path, one in whole.items() if one.kind[1].count("s") > 1}
    return whole.keys() == later.keys() and all(_close(whole[path], later[path]) for path in whole.keys() - weights)


def _alike(whole: dict[Path, _Told], later: dict[Path, _Told]) -> bool:
    """Whether they differ in numbers only, and not in what there is and how large it is."""
    return {path: one.kind for path, one in whole.items()} == {path: one.kind for path, one in later.items()}


def _close(whole: _Told, later: _Told) -> bool:
    if whole.kind != later.kind:
        return False
    ours, theirs = whole.numbers[len(whole.numbers) - len(later.numbers) :], later.numbers
    if not ours.numel():
        return True
    differ = (ours - theirs).abs().amax(1) > whole.tolerance * ours.abs().max()
    return float(differ.double().mean()) <= _UNDECIDED


def _next(results: Iterator[Any], *_: Any, **__: Any) -> Any:
    """What a module on whole tensors returns, call by call, instead of working."""
    return next(results)
