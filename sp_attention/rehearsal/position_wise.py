"""Which parts of layers treat each token alone: they give for some tokens what they give for them within a sequence."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sp_attention.region.kept import Attributes, as_before
from sp_attention.region.pytree import Path, map_leaves, tensors
from sp_attention.region.sequence_dims import Dims, Extent, dims
from sp_attention.rehearsal.layer_stacks import StackDraft
from sp_attention.rehearsal.trace import ModuleCall, Trace, same


class PositionWiseProof:
    """Called with every call of a module in a narrow run: proves that the parts of the stacks are position-wise.

    suspects: each part of each layer, and each layer in which nothing attends, with the extents of its stack. results:
    of those that were called, whether they are.
    """

    def __init__(self, drafts: list[StackDraft], wide: Trace, results: dict[nn.Module, bool]) -> None:
        self.suspects: dict[nn.Module, tuple[Extent, Extent]] = {}
        for draft in drafts:
            for layer in draft.layers:
                for part in parts_in(layer.module, set(draft.modes)):
                    self.suspects[part] = draft.extents
                if not draft.attends:
                    self.suspects[layer.module] = draft.extents
        # What a part writes into itself is no reason for which it would not be.
        self.before = {module: Attributes.of(module) for module in self.suspects}
        self.wide, self.results = wide, results
        self.done = dict.fromkeys(self.suspects, 0)

    def __call__(self, module: nn.Module, called: ModuleCall) -> None:
        if module not in self.suspects or (module in self.results and not self.results[module]):
            return
        others, index = self.wide.calls[module], self.done[module]
        self.done[module] += 1
        with as_before(module):
            self.results[module] = index < len(others) and _is_position_wise(
                module, called, others[index], self.suspects[module], self.before[module]
            )


def _is_position_wise(
    module: nn.Module, called: ModuleCall, other: ModuleCall, extents: tuple[Extent, Extent], before: Attributes
) -> bool:
    """Whether a module, as it was `before`, gives for some tokens alone what it gives for them within the sequence."""
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
        before.restore()
        try:
            result = module(*args, **kwargs)
        except Exception:  # whatever a strange module raises when it is given fewer tokens
            return False
        if not same(result, alone(called.output, out)):
            return False
    return True


def fits(inputs: Any, output: Any) -> bool:
    """Whether a module was given a tensor [..., tokens, E] and nothing else, and returned [..., tokens, E']."""
    given = dict(tensors(inputs))
    if given.keys() != {(0, 0)} or not isinstance(output, Tensor):
        return False
    return given[0, 0].dim() in (2, 3) and output.shape[:-1] == given[0, 0].shape[:-1]


def keeps_more(module: nn.Module) -> bool:
    """Whether a module keeps more for backward than what it is given: a norm, or what has several matrices."""
    return matrices_in(module) != 1 and any(True for _ in module.parameters())


def matrices_in(module: nn.Module) -> int:
    """How many matrices a module and its parts have."""
    # ZeRO-3 keeps the shapes of what it has cut up.
    return sum(len(getattr(one, "ds_shape", one.shape)) > 1 for one in module.parameters())


def children_of(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, and of its containers, which are never called."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from children_of(child)
        else:
            yield child


def parts_in(module: nn.Module, attending: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest parts of a module in which nothing attends."""
    for child in children_of(module):
        yield from parts_of(child, attending)


def parts_of(child: nn.Module, attending: set[nn.Module]) -> Iterator[nn.Module]:
    if attending.intersection(child.modules()):
        yield from parts_in(child, attending)
    else:
        yield child
