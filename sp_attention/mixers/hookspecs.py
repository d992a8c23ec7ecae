"""The one hook that plugins with mixer functions implement.

A whole plugin, found through an entry point of the group `sp_attention_mixers` that names its module:

    from sp_attention.mixers import Cut, Scan, hookimpl

    BY_HEAD = Cut(tokens=1, heads=2)        # [B, S, H, …]

    @hookimpl
    def sp_attention_mixers():
        arguments = {"query": BY_HEAD, "key": BY_HEAD, "value": BY_HEAD, "decay": Cut(None, 0)}
        return [Scan("my recurrence", ("my_recurrence",), arguments, result=BY_HEAD)]

with, in its pyproject.toml,

    [project.entry-points.sp_attention_mixers]
    mine = "my_package.my_module"

Its test is one line: `sp_attention.mixers.testing.conform(scan, my_recurrence, arguments_of)`.
"""

from collections.abc import Iterable

import pluggy

from sp_attention.mixers.declared import Mixer

hookspec = pluggy.HookspecMarker("sp_attention")
hookimpl = pluggy.HookimplMarker("sp_attention")


@hookspec
def sp_attention_mixers() -> Iterable[Mixer]:  # type: ignore[empty-body]  # a specification has no body
    """Return the mixer functions that this plugin knows, as models call them.

    Called when a model is enabled, on every rank, before any collective; it must return the same on all ranks that have
    the same packages. A model's own function is called, with the arguments of this rank's heads, or of its span; what
    is said here of how they are cut is believed only where the rehearsal of enable() gives the numbers of the whole
    model. Of two for one function, that of a device goes before that of any, and of two plugins neither is used. A
    plugin that raises, or returns anything else, is recorded with its reason and disturbs no other.
    """
