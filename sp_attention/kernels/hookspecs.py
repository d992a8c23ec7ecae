"""The one hook that plugins implement.

A whole plugin, found through an entry point of the group `sp_attention` that names its module:

    import sp_attention

    def attend(request):                    # [B, S, h, D] … → [B, S, h, Dv]
        ...

    @sp_attention.hookimpl
    def sp_attention_backends():
        return [sp_attention.Backend(device="cpu", kernel="mine", attend=attend)]

with, in its pyproject.toml,

    [project.entry-points.sp_attention]
    mine = "my_package.my_module"
"""

from collections.abc import Iterable

import pluggy

from sp_attention.kernels.request import Backend

hookspec = pluggy.HookspecMarker("sp_attention")
hookimpl = pluggy.HookimplMarker("sp_attention")


@hookspec
def sp_attention_backends() -> Iterable[Backend]:  # type: ignore[empty-body]  # a specification has no body
    """Return the backends this plugin offers.

    Called when a backend is first looked up, once per look-up of the registry, on every rank, before any collective;
    it must return the same on all ranks that have the same packages. It should not import the kernel package: do so
    in `attend`, and say in `Backend.unavailable` why a kernel cannot be used here. A plugin that raises, or returns
    anything else than backends, is recorded with its reason and disturbs no other.
    """
