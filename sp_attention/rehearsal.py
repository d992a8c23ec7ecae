"""A tiny forward in enable() that finds the stack of layers and proves that cutting it by tokens is exact.

There is no table of model names. What attends through transformers' attention interface is head-parallel; any other
part of a layer must give for some tokens alone what it gives for them within the sequence; and in the end the sharded
model must give what the whole one gives. Where one of these fails, the model is refused.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sp_attention.attention import Mask
from sp_attention.errors import UnsupportedError
from sp_attention.region import DROPOUT, Layer, random_state
from sp_attention.trees import Path, map_leaves, tensors

# Largest difference, relative to the largest number, of two computations of the same thing: the order of sums
# differs, and models compute parts in float32 whatever their dtype.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Findings:
    """What was found in a model.

    stack: the name of the list of layers. models: those around it, outermost first. kinds: for each part of each
    layer, by name, what it is. untrainable: why training would not be exact, None if it would be.
    """

    stack: str
    layers: tuple[Layer, ...]
    models: tuple[PreTrainedModel, ...]
    kinds: Mapping[str, str]
    untrainable: str | None


@dataclass(frozen=True)
class Run:
    """A forward on one batch [B, S]: the calls of the watched modules, as (arguments, output), in their order."""

    batch: int
    length: int
    calls: dict[nn.Module | None, list[tuple[Any, Any]]]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run what is inside without gradients or checkpointing; modes, buffers and random numbers stay as they were."""
    training = {module: module.training for module in model.modules()}
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    randomness = random.getstate()
    device = next(model.parameters()).device
    fork = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]  # a flag, not a module
        with torch.no_grad(), torch.random.fork_rng(**{"devices": [], **fork}):
            yield
    finally:
        random.setstate(randomness)
        for module, mode in training.items():
            module.training = mode
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]  # a flag, not a module
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def batch_of(model: PreTrainedModel, size: int, length: int) -> dict[str, Tensor]:
    """Ordinary tokens [B, S], always the same; row 0 is padded on the left."""
    special: set[int] = set()

    def collect(settings: Mapping[str, Any]) -> None:
        for key, value in settings.items():
            if isinstance(value, dict):
                collect(value)
            elif "token" in str(key) and isinstance(value, int):
                special.add(value)

    collect(model.config.to_dict())
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if model.main_input_name != "input_ids" or vocabulary is None:
        raise UnsupportedError(f"{type(model).__name__} does not take token ids, which is not covered yet")
    ordinary = torch.tensor([token for token in range(min(vocabulary, 1024)) if token not in special])
    picked = torch.randint(len(ordinary), (size, length), generator=torch.Generator().manual_seed(0))
    ids = ordinary[picked].to(model.device)
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    return {"input_ids": ids, "attention_mask": padding}


def explore(model: PreTrainedModel, attended: list[nn.Module], ranks: int) -> Findings:
    """Find the layers of a model and prove their parts; `attended` must grow by each module that attends.

    The model is left in training mode, unless it draws random numbers in training. Raises UnsupportedError for what
    cannot be proven.
    """
    # Longer than the ranks, not divisible by them, and no two numbers alike.
    small = batch_of(model, 2, max(13, 2 * ranks + 1))
    big = batch_of(model, 3, max(19, 3 * ranks + 1))
    model.train()
    before = random_state(model.device)
    model(**big)
    untrainable = None
    if not all(map(torch.equal, random_state(model.device), before)):
        model.eval()
        untrainable = DROPOUT
    attending = set(attended)
    names = {module: name for name, module in model.named_modules()}
    stack = _stack(model, [names[module] for module in attended])
    layers = list(model.get_submodule(stack).children())
    parts = [part for layer in layers for part in _parts(layer, attending)]
    kinds = {names[module]: "head-parallel" for module in attending}
    wide = _record(model, [*layers, *parts], big)

    def prove(module: nn.Module, index: int, run: Run) -> None:
        if module in parts:
            kinds[names[module]] = _prove(module, names[module], index, run, wide)

    narrow = _record(model, [*layers, *parts], small, prove)
    return Findings(
        stack,
        tuple(_layers(layers, names, narrow, wide)),
        tuple(
            module
            for module in model.modules()
            if isinstance(module, PreTrainedModel) and layers[0] in module.modules()
        ),
        kinds,
        untrainable,
    )


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


def _stack(model: nn.Module, attending: list[str]) -> str:
    """The name of the list of modules that holds all that attends."""
    if not attending:
        raise UnsupportedError(
            f"{type(model).__name__} does not attend through transformers' attention interface; this is not covered yet"
        )
    stacks = set()
    for name in attending:
        parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
        stacks.add(next((parent for parent in parents if isinstance(model.get_submodule(parent), nn.ModuleList)), name))
    if len(stacks) > 1 or not isinstance(model.get_submodule(min(stacks)), nn.ModuleList):
        raise UnsupportedError(
            f"{type(model).__name__} attends in {', '.join(sorted(stacks))}; one list of layers is what is covered yet"
        )
    return stacks.pop()


def _parts(module: nn.Module, attending: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest parts of a module in which nothing attends."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or attending.intersection(child.modules()):
            yield from _parts(child, attending)
        else:
            yield child


def _record(
    model: nn.Module,
    modules: list[nn.Module],
    batch: Mapping[str, Tensor],
    prove: Callable[[nn.Module, int, Run], None] | None = None,
) -> Run:
    """A forward that records all calls of `modules`.

    `prove` is told of each right after it, while an engine that shards parameters still has them gathered.
    """
    size, length = batch["input_ids"].shape
    run = Run(size, length, {module: [] for module in modules})
    proving = False

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal proving
        if proving:
            return
        run.calls[module].append(((args, dict(kwargs)), output))
        if prove is not None:
            proving = True
            prove(module, len(run.calls[module]) - 1, run)
            proving = False

    handles = [module.register_forward_hook(after, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return run


def _dims(name: str, tree: Any, other: Any, narrow: Run, wide: Run) -> dict[Path, int | None]:
    """For each tensor of `tree`, the dim that is S here and in the other run too; None where no dim follows S."""
    dims: dict[Path, int | None] = {}
    others = dict(tensors(other))
    for path, tensor in tensors(tree):
        pairs = list(zip(tensor.shape, others[path].shape if path in others else (), strict=False))
        along = [dim for dim, pair in enumerate(pairs) if pair == (narrow.length, wide.length)]
        rest = [pair for dim, pair in enumerate(pairs) if dim not in along and pair != (narrow.batch, wide.batch)]
        if len(pairs) != tensor.dim() or len(along) > 1 or any(left != right for left, right in rest):
            raise UnsupportedError(
                f"{name}: a tensor {list(tensor.shape)} in a batch of {narrow.batch} rows of {narrow.length} tokens "
                "cannot be cut by tokens; this is not covered yet"
            )
        dims[path] = along[0] if along else None
    return dims


def _prove(module: nn.Module, name: str, index: int, narrow: Run, wide: Run) -> str:
    """The kind of a part in which nothing attends. Raises UnsupportedError if its tokens depend on each other."""
    (inputs, output), (other_inputs, other_output) = narrow.calls[module][index], wide.calls[module][index]
    into, out = _dims(name, inputs, other_inputs, narrow, wide), _dims(name, output, other_output, narrow, wide)
    if set(into.values()) | set(out.values()) == {None}:
        return "not on the sequence"
    length = narrow.length
    for start, stop in ((0, length // 2), (length // 2, length), (length // 3, length // 3 + 1), (length - 1, length)):

        def alone(tree: Any, dims: Mapping[Path, int | None], start: int = start, stop: int = stop) -> Any:
            def cut(path: Path, leaf: Any) -> Any:
                dim = dims.get(path)
                return leaf if dim is None else leaf.narrow(dim, start, stop - start).contiguous()

            return map_leaves(cut, tree)

        args, kwargs = alone(inputs, into)
        if not same(module(*args, **kwargs), alone(output, out)):
            raise UnsupportedError(
                f"{name} ({type(module).__name__}) mixes positions outside of transformers' attention interface, which "
                "is not covered yet: for some tokens alone it gives something else than for them within the sequence"
            )
    return "position-wise"


def _layers(layers: list[nn.Module], names: Mapping[nn.Module, str], narrow: Run, wide: Run) -> Iterator[Layer]:
    """The layers with what is known of their arguments; raises UnsupportedError unless each hands over to the next."""
    arriving: set[int] = set()
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        name = names[layer]
        if len(narrow.calls[layer]) != 1 or len(wide.calls[layer]) != 1:
            raise UnsupportedError(f"{name} is not called exactly once in a forward, which is not covered yet")
        (inputs, output), (other_inputs, other_output) = narrow.calls[layer][0], wide.calls[layer][0]
        results = _dims(name, output, other_output, narrow, wide)
        handed = [tensor for path, tensor in tensors(output) if results[path] is not None]
        taken = {id(tensor) for call, _ in narrow.calls.get(following, []) for _, tensor in tensors(call)}
        if not handed or (following is not None and not all(id(tensor) in taken for tensor in handed)):
            raise UnsupportedError(
                f"{name}: the next layer is not given just what this one returns; this is not covered yet"
            )
        dims = _dims(name, inputs, other_inputs, narrow, wide)
        already_cut = frozenset(path for path, tensor in tensors(inputs) if id(tensor) in arriving)
        yield Layer(name, layer, _mask_path(name, inputs), already_cut, dims, results)
        arriving = {id(tensor) for tensor in handed}


def _mask_path(name: str, inputs: Any) -> Path:
    found: list[Path] = []
    map_leaves(lambda path, leaf: found.append(path) if isinstance(leaf, Mask) else None, inputs)
    if len(found) != 1:
        raise UnsupportedError(f"{name} is given {len(found)} attention masks instead of one; this is not covered yet")
    return found[0]
