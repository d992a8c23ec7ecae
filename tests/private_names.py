"""What the checks of other packages' names share: the table of docs/private-names.md, and what our source reads."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "sp_attention", *sorted(ROOT.glob("backends/*/sp_attention_*")))

# An AssertionError unless what a name stands for is what we take it for.
Check = Callable[[Any], None]

# Python's own, which it documents; ends of names; and of ms-swift, in a benchmark of what happens to be installed.
_PYTHON = {"_exit", "_fields"}
_ENDS = {"_MAPPING_NAMES", "_attention_cache", "_token_id", "_token_index"}
_ELSEWHERE = {"_SeqAllToAll"}


def table() -> dict[str, list[str]]:
    """The names of docs/private-names.md in its order, with the files of sp_attention/ that use them."""
    page = (ROOT / "docs" / "private-names.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", page, re.MULTILINE)
    return {name: re.findall(r"`(\S+)`", places) for name, places in rows}


def names_of(*packages: str) -> list[str]:
    """Those of the table that are of these packages."""
    return [name for name in table() if name.split(".")[0] in packages]


def thing_called(name: str, made: dict[str, Callable[[], Any]]) -> Any:
    """What a dotted name stands for; beyond a class of `made`, an attribute of what is made of it."""
    parts = name.split(".")
    thing: Any = import_module(parts[0])
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        thing = made[path]() if path in made else thing
        if inspect.ismodule(thing) and not hasattr(thing, parts[end]):
            import_module(f"{path}.{parts[end]}")
        thing = getattr(thing, parts[end])
    return thing


def takes(*first: str, also: tuple[str, ...] = ()) -> Check:
    """Its arguments begin with these names, in this order, and have the others too."""

    def check(function: Any) -> None:
        names = list(inspect.signature(function).parameters)
        assert names[: len(first)] == list(first)
        assert set(also) <= set(names)

    return check


def reads(*names: str) -> Check:
    """The function's code mentions these attributes."""

    def check(function: Any) -> None:
        assert set(names) <= set(inspect.unwrap(function).__code__.co_names)

    return check


def is_a(kind: type) -> Check:
    def check(thing: Any) -> None:
        assert isinstance(thing, kind)

    return check


def every(*checks: Check) -> Check:
    def check(thing: Any) -> None:
        for one in checks:
            one(thing)

    return check


def private_names() -> set[tuple[str, str]]:
    """Names with one leading underscore that we use and are not our own: the file, as in the table, and the name."""
    trees = {file: ast.parse(file.read_text()) for package in PACKAGES for file in sorted(package.glob("**/*.py"))}
    own = {name for tree in trees.values() for name in _defined(tree)}
    ours = {file: str(file.relative_to(ROOT)).removeprefix("sp_attention/") for file in trees}
    found = {(ours[file], name) for file, tree in trees.items() for name in _foreign(tree, own)}
    return {(file, name) for file, name in found if name not in _PYTHON | _ENDS | _ELSEWHERE}


def _defined(tree: ast.AST) -> Iterator[str]:
    """The names that a file of ours defines or assigns."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("sp_attention"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and not _is_self(node.value):
            # What is asked of super() is another's, although we define it too.
            names = [node.attr] if _is_super(node.value) or node.attr not in own else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value not in own and not node.value.startswith("_sp_attention") else []
        else:
            names = []
        yield from (one for one in names if re.fullmatch(r"_[A-Za-z]\w*", one))


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
