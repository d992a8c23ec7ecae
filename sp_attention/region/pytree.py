"""Tensors inside the nested tuples, lists and dicts that modules pass to each other, by their path."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

Path = tuple[str | int, ...]


def map_leaves(change: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The same tree with every leaf replaced by `change(path, leaf)`; a leaf is whatever is not a container."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(change, item, (*path, i)) for i, item in enumerate(tree)))
    if type(tree) in (tuple, list):
        return type(tree)(map_leaves(change, item, (*path, i)) for i, item in enumerate(tree))
    if type(tree) is dict:
        return {key: map_leaves(change, item, (*path, key)) for key, item in tree.items()}
    return change(path, tree)


def tensors(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor of a tree with its path, model outputs (which are dicts) included."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from tensors(item, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for i, item in enumerate(tree):
            yield from tensors(item, (*path, i))


def leaves(tree: Any) -> list[tuple[Path, Any]]:
    """Every leaf of a tree, as `map_leaves` understands it, with its path."""
    found: list[tuple[Path, Any]] = []
    map_leaves(lambda path, leaf: found.append((path, leaf)), tree)
    return found


def leaf_at(tree: Any, path: Path) -> Any:
    """What stands at `path`, None where the path ends early."""
    for key in path:
        if not (key in tree if isinstance(tree, dict) else isinstance(key, int) and key < len(tree)):
            return None
        tree = tree[key]
    return tree


def text_of(path: Path) -> str:
    """A path as text for people."""
    return ".".join(map(str, path))
