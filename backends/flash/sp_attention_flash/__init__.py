"""Kernels `flash2`, `flash3`, `flash4`: the flash-attn packages; and `flash`, the best of those that can be used here.

Beside them, a build of flash-attn 2 from the Hub, which is taken only by its name: it is fetched when it is called.
A mask becomes sequences that the packages attend in (`sp_attention.kernels.varlen`); what they cannot do is refused
(`refusing`); a package that cannot be used is offered as unavailable, with the cure (`finding`).
"""

from functools import partial

from sp_attention import Backend, hookimpl
from sp_attention_flash import refusing
from sp_attention_flash.attending import attend
from sp_attention_flash.finding import best, unusable
from sp_attention_flash.packages import HUB2, PACKAGES, Package


@hookimpl
def sp_attention_backends() -> list[Backend]:
    reasons = {package: unusable(package) for package in PACKAGES}
    usable = [package for package, reason in reasons.items() if reason is None]
    none = "no flash-attn package can be used; `sp-attention backends` says of flash2, flash3 and flash4 why"
    chosen = best(usable)
    return [
        backend("flash", chosen or PACKAGES[0], priority=20, unavailable=None if chosen else none),
        *(backend(package.kernel, package, 15, reason) for package, reason in reasons.items()),
        backend(HUB2.kernel, HUB2, priority=-1, unavailable=unusable(HUB2)),
    ]


def backend(kernel: str, package: Package, priority: int, unavailable: str | None) -> Backend:
    """A package under a name."""
    return Backend(
        refusing.DEVICE,
        kernel,
        partial(attend, package),
        priority=priority,
        unavailable=unavailable,
        refuses=partial(refusing.refuses, package),
    )
