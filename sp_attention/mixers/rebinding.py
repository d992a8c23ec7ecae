"""A forward made anew of its own code and closure, that finds other functions under some names.

So a module's forward calls ours in place of a mixer function, and neither its class nor its file is touched.
"""

import dis
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any


def globals_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function, and those in its closure, such as the one that a decorator wraps, read from their modules."""
    found: dict[str, Any] = {}
    for one in _functions(function, set()):
        names = _globals_read(one.__code__)
        found |= {name: one.__globals__[name] for name in names if name in one.__globals__}
    return found


def rebound(function: Callable[..., Any], others: Mapping[str, Any]) -> Callable[..., Any]:
    """The function as it is, but for these names, which it and those in its closure find others under."""
    return _rebound(function, others, {}) if isinstance(function, FunctionType) else function


def _rebound(function: FunctionType, others: Mapping[str, Any], done: dict[FunctionType, FunctionType]) -> FunctionType:
    if function in done:
        return done[function]
    done[function] = function  # a function that is in its own closure stays as it is there
    cells = tuple(_rebound_cell(cell, others, done) for cell in function.__closure__ or ())
    names = others.keys() & _globals_read(function.__code__)
    if not names and all(one is other for one, other in zip(cells, function.__closure__ or (), strict=True)):
        return function
    anew = FunctionType(
        function.__code__,
        {**function.__globals__, **{name: others[name] for name in names}},
        function.__name__,
        function.__defaults__,
        cells or None,
    )
    anew.__kwdefaults__, anew.__qualname__, anew.__doc__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__doc__,
    )
    anew.__annotations__ = function.__annotations__
    anew.__dict__.update(function.__dict__)
    done[function] = anew
    return anew


def _rebound_cell(cell: CellType, others: Mapping[str, Any], done: dict[FunctionType, FunctionType]) -> CellType:
    held = _held(cell)
    if not isinstance(held, FunctionType):
        return cell
    anew = _rebound(held, others, done)
    return cell if anew is held else CellType(anew)


def _functions(function: Any, seen: set[Any]) -> Iterator[FunctionType]:
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    yield function
    for cell in function.__closure__ or ():
        yield from _functions(_held(cell), seen)


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a cell that nothing has been put into yet
        return None


def _globals_read(code: CodeType) -> set[str]:
    """The names that code, and what is defined in it, reads from its module."""
    found = {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        found |= _globals_read(constant) if isinstance(constant, CodeType) else set()
    return found
