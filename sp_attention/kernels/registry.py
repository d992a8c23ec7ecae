"""(device, kernel) → backend, from the plugins that are installed, broken ones included."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Any

from sp_attention.errors import BackendError
from sp_attention.kernels import hookspecs
from sp_attention.kernels.plugins import BrokenPlugin as BrokenPlugin
from sp_attention.kernels.plugins import Plugin as Plugin
from sp_attention.kernels.plugins import offers_of, told_of_several
from sp_attention.kernels.request import Backend


@dataclass(frozen=True)
class Registered:
    """A backend and the plugin it comes from; `problem` is why it cannot be used, None when it can."""

    backend: Backend
    plugin: Plugin
    problem: str | None


@dataclass(frozen=True)
class Registry:
    """All that the installed plugins offer, sorted by device, kernel and plugin."""

    backends: tuple[Registered, ...]
    broken: tuple[BrokenPlugin, ...]


def load() -> Registry:
    """Ask every installed plugin for its backends. Nothing a plugin does wrong is raised here."""
    offers, broken = offers_of("sp_attention", hookspecs, "sp_attention_backends", _checked)
    offers.sort(key=lambda offer: (offer[1].device, offer[1].kernel, str(offer[0])))
    entries = (Registered(backend, plugin, _problem(plugin, backend, offers)) for plugin, backend in offers)
    return Registry(tuple(entries), broken)


def usable(device: str, registry: Registry | None = None) -> tuple[Backend, ...]:
    """Every backend that can be used on a device type ("cpu", "cuda", …), the one of highest priority first."""
    entries = (registry or load()).backends
    here = [entry.backend for entry in entries if entry.backend.device in (device, "any") and entry.problem is None]
    return tuple(sorted(here, key=lambda backend: (-backend.priority, backend.device == "any", backend.kernel)))


def find(device: str, kernel: str, registry: Registry | None = None) -> Backend:
    """The backend of a device type that `kernel` names.

    Raises BackendError with the reason when it is unknown, unavailable, offered twice, or its plugin is broken.
    """
    registry = registry or load()
    named = [entry for entry in registry.backends if entry.backend.kernel == kernel]
    here = [entry for entry in named if entry.backend.device in (device, "any")]
    choices = ", ".join(backend.kernel for backend in usable(device, registry)) or "none"
    choices = f"Installed kernels that can be used: {choices}."
    if not here:
        elsewhere = sorted({entry.backend.device for entry in named})
        where = f" (it exists on {', '.join(elsewhere)})" if elsewhere else ""
        raise BackendError(f"unknown backend {kernel!r} on {device}{where}. {choices}{_broken(registry)}")
    best = min(here, key=lambda entry: (entry.problem is not None, entry.backend.device == "any"))
    if best.problem is not None:
        raise BackendError(f"backend {kernel!r} on {device} cannot be used: {best.problem}. {choices}")
    return best.backend


def candidates(device: str, kernel: str) -> tuple[Backend, ...]:
    """What `find` finds; for "auto" all that can be used, the best first. Raises BackendError if there is nothing."""
    registry = load()
    if kernel != "auto":
        return (find(device, kernel, registry),)
    found = usable(device, registry)
    if not found:
        raise BackendError(f"no backend can be used on {device}.{_broken(registry)}")
    return found


# What the fields of a backend are; those of others may be anything.
_KINDS: dict[str, Any] = {
    "device": str,
    "kernel": str,
    "priority": int,
    "unavailable": (str, NoneType),
    "attend": Callable,
    "refuses": Callable,
    "attend_with_weights": (Callable, NoneType),
}


def _checked(offered: Iterable[Any], name: str) -> list[Backend]:
    backends = list(offered)
    for backend in backends:
        if not isinstance(backend, Backend):
            raise TypeError(f"{name} returned {backend!r} among its backends")
        for field, kinds in _KINDS.items():
            value = getattr(backend, field)
            if not isinstance(value, kinds):
                raise TypeError(f"{name} returned a backend whose {field} is {value!r}")
    return backends


def _problem(plugin: Plugin, backend: Backend, offers: list[tuple[Plugin, Backend]]) -> str | None:
    duplicates = [
        other
        for other, offered in offers
        if offered.kernel == backend.kernel
        and (offered.device == backend.device or "any" in (offered.device, backend.device))
    ]
    # This library's own kernels cannot be broken by a plugin that takes their name.
    if len(duplicates) > 1 and not plugin.is_ours:
        return told_of_several(duplicates)
    return backend.unavailable


def _broken(registry: Registry) -> str:
    return "".join(f" Plugin {plugin.plugin} is broken: {plugin.reason}." for plugin in registry.broken)
