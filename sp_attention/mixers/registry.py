"""(device, function) → how it is cut, from the plugins that are installed, broken ones included."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from sp_attention.kernels.plugins import BrokenPlugin, Plugin, offers_of, told_of_several
from sp_attention.mixers import hookspecs
from sp_attention.mixers.declared import Mixer


@dataclass(frozen=True)
class RegisteredMixer:
    """A mixer and the plugin it comes from; `problem` is why it cannot be used, None when it can."""

    mixer: Mixer
    plugin: Plugin
    problem: str | None


@dataclass(frozen=True)
class MixerRegistry:
    """All that the installed plugins offer, sorted by device, name and plugin."""

    mixers: tuple[RegisteredMixer, ...]
    broken: tuple[BrokenPlugin, ...]


def load() -> MixerRegistry:
    """Ask every installed plugin for its mixers. Nothing a plugin does wrong is raised here."""
    offers, broken = offers_of("sp_attention_mixers", hookspecs, "sp_attention_mixers", _checked)
    offers.sort(key=lambda offer: (offer[1].device, offer[1].name, str(offer[0])))
    entries = (RegisteredMixer(mixer, plugin, _problem(plugin, mixer, offers)) for plugin, mixer in offers)
    return MixerRegistry(tuple(entries), broken)


def usable(device: str) -> Mapping[str, Mixer]:
    """By the name of a function, the mixer that it is on a device type: one of the device, or else one of any."""
    found: dict[str, Mixer] = {}
    for entry in sorted(load().mixers, key=lambda entry: entry.mixer.device == device):
        if entry.problem is None and entry.mixer.device in (device, "any"):
            found |= dict.fromkeys(entry.mixer.functions, entry.mixer)
    return found


def _checked(offered: Iterable[Any], name: str) -> list[Mixer]:
    mixers = list(offered)
    for mixer in mixers:
        if not isinstance(mixer, get_args(Mixer)):
            raise TypeError(f"{name} returned {mixer!r} among its mixers")
    return mixers


def _problem(plugin: Plugin, mixer: Mixer, offers: list[tuple[Plugin, Mixer]]) -> str | None:
    others = {
        str(other): other
        for other, offered in offers
        if offered.device == mixer.device and not set(offered.functions).isdisjoint(mixer.functions)
    }
    # What this library knows cannot be broken by a plugin that takes its name.
    return told_of_several(others.values()) if len(others) > 1 and not plugin.is_ours else None
