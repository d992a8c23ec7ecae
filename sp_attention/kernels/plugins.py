"""What installed plugins offer, one plugin at a time, so that none disturbs another."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

import pluggy

Offer = TypeVar("Offer")


@dataclass(frozen=True)
class Plugin:
    """An entry point of a group of ours; in text, the distribution it comes from, its version and name."""

    point: EntryPoint

    @property
    def is_ours(self) -> bool:
        return self.point.dist is not None and self.point.dist.name == "sp-attention"

    def __str__(self) -> str:
        dist = self.point.dist
        return f"{dist.name} {dist.version} ({self.point.name})" if dist else self.point.name


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that offers nothing because loading it, or asking it, failed."""

    plugin: Plugin
    reason: str


def offers_of(
    group: str, hookspecs: ModuleType, hook: str, checked: Callable[[Iterable[Any], str], list[Offer]]
) -> tuple[list[tuple[Plugin, Offer]], tuple[BrokenPlugin, ...]]:
    """What every installed plugin of a group offers by a hook. Nothing a plugin does wrong is raised here.

    `checked` is given what one returned, and its name for the text, and raises TypeError for anything wrong in it.
    """
    offers: list[tuple[Plugin, Offer]] = []
    broken: list[BrokenPlugin] = []
    for plugin in sorted(map(Plugin, entry_points(group=group)), key=str):
        try:
            offered = _ask(plugin.point, hookspecs, hook)
            if not isinstance(offered, Iterable):
                raise TypeError(f"{plugin.point.value} returned {offered!r} instead of {hook.rpartition('_')[2]}")
            offers += [(plugin, offer) for offer in checked(offered, plugin.point.value)]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # Third-party code: keep the others alive, and keep the reason. Scripts that end themselves on a wrong
            # machine raise SystemExit, and extensions written in Rust panic in a class of their own.
            broken.append(BrokenPlugin(plugin, f"{type(error).__name__}: {error}"))
    return offers, tuple(broken)


def told_of_several(plugins: Iterable[Plugin]) -> str:
    """Why what several plugins offer cannot be used."""
    return f"several plugins offer it, {', '.join(map(str, plugins))}: uninstall all but one"


def _ask(point: EntryPoint, hookspecs: ModuleType, hook: str) -> Any:
    """Load one plugin and call its hook, by itself so that it cannot disturb the others."""
    manager = pluggy.PluginManager("sp_attention")
    manager.add_hookspecs(hookspecs)
    manager.register(point.load(), name=point.name)
    manager.check_pending()
    asked = getattr(manager.hook, hook)
    if not asked.get_hookimpls():
        raise TypeError(f"{point.value} does not implement the hook {hook}")
    # pluggy leaves out an answer that is None.
    return next(iter(asked()), None)
