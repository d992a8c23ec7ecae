"""Masks in half precision on CUDA: which of torch's attention kernels were seen to be right, and may be used.

On an H200 with torch 2.11, gradients of queries were wrong with windows, outputs right, and all of it right in float32.
So training with a mask is refused there until `ci/gpu --stage masks` has seen it right, with this version of torch on a
device of this compute capability: `seen_on_devices.py`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sp_attention.kernels.cudnn import without_cudnn
from sp_attention.kernels.request import Request
from sp_attention.kernels.seen_on_devices import SEEN

HALF = (torch.float16, torch.bfloat16)
# Those of torch that may be taken alone. cuDNN's is not: what it does depends on what it did before (see cudnn.py).
ALONE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
VERSION = ".".join(torch.__version__.split(".")[:2])


@dataclass(frozen=True)
class Ruling:
    """What was seen of one kind of mask in one dtype, on devices like this one and with this torch.

    chosen: whether torch's choice was right, None where it was not seen. alone: those that were right by themselves.
    """

    chosen: bool | None
    alone: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether there is something to take that was seen to be right."""
        return bool(self.chosen or self.alone)


def in_half_on_cuda(request: Request) -> bool:
    """Whether all this is about it."""
    return request.query.device.type == "cuda" and request.query.dtype in HALF


def ruling(kernel: str, kind: str, request: Request) -> Ruling:
    """What was seen of a kind of mask, for a request in half precision on CUDA."""
    return _ruling(kernel, kind, str(request.query.dtype).removeprefix("torch."), capability(request.query.device))


def _ruling(kernel: str, kind: str, dtype: str, device: str | None) -> Ruling:
    like = (kernel, VERSION, device, kind, dtype)
    found = {
        seen.backend: seen.right
        for seen in SEEN
        if (seen.kernel, seen.torch, seen.device, seen.kind, seen.dtype) == like
    }
    return Ruling(found.get("chosen"), tuple(name for name in ALONE if found.get(name)))


@cache
def capability(device: torch.device) -> str | None:
    """Compute capability, such as "9.0"; None where torch cannot tell."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def refused(kernel: str, kind: str | None, request: Request) -> str | None:
    """The reason against training with it, None where it was seen to be right, or torch is given no mask."""
    if kind is None or ruling(kernel, kind, request).right:
        return None
    return (
        "in half precision on CUDA, gradients of torch's scaled_dot_product_attention with a mask, which a window, "
        f"a bias or a mask tensor needs, were found wrong, and have not been seen right ({kind}) with torch {VERSION} "
        f"on a device of compute capability {capability(request.query.device) or 'unknown'}"
    )


def refused_if_wrong(kernel: str, kind: str | None, request: Request) -> str | None:
    """`refused`, but for a kernel of which nothing wrong was seen: the reason only where something was."""
    seen = Ruling(None, ()) if kind is None else ruling(kernel, kind, request)
    return refused(kernel, kind, request) if seen.chosen is False else None


def torchs_choice(
    kernel: str, kind_of: Callable[[Request], str | None], request: Request
) -> AbstractContextManager[None]:
    """Within it torch takes what was seen to be right: its own choice, also where nothing was seen, or one of others.

    Never cuDNN's attention.
    """
    kind = kind_of(request) if in_half_on_cuda(request) else None
    seen = Ruling(None, ()) if kind is None else ruling(kernel, kind, request)
    if seen.alone and not seen.chosen:
        return sdpa_kernel([ALONE[name] for name in seen.alone])
    return without_cudnn()
