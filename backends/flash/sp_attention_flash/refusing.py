"""What the packages do not do exactly. On fake tensors they reject nothing themselves, so all of it is checked here."""

import torch

from sp_attention import Request
from sp_attention_flash.attending import size_that_fits
from sp_attention_flash.packages import FLASH3, FLASH4, Package

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)
LARGEST = 256


def refuses(package: Package, request: Request) -> str | None:
    """The reason why a package cannot do this exactly, None when it can. Looks at no values."""
    device = request.query.device
    if device.type != DEVICE:
        return f"{package.kernel} computes on {DEVICE}, and this is on {device.type}; sdpa computes on both"
    return _refuses_features(package, request) or _refuses_sizes(package, request, _arch(device))


def _arch(device: torch.device) -> int | None:
    """The major compute capability of a device, None where that is not CUDA."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


def _refuses_features(package: Package, request: Request) -> str | None:
    name, mask = package.kernel, request.mask
    if mask.explicit is not None:
        return f"{name} takes no mask tensors; sdpa and transformers:eager do"
    if mask.function is not None:
        return f"{name} takes no mask functions; sdpa and transformers:eager do"
    if request.bias is not None:
        return f"{name} adds no bias to the scores; sdpa and transformers:eager do"
    if request.dropout and not package.dropout:
        return f"{name} has no dropout; flash2, sdpa and transformers:eager have"
    if request.dropout and request.softcap is not None:
        return f"{name} has a softcap, or dropout, but not both; transformers:eager has"
    if request.dropout and request.sinks is not None:
        # It would return its weights, quadratic in memory, beside the log-sum-exps that are wanted for sinks.
        return f"{name} has attention sinks, or dropout, but not both; sdpa and transformers:eager have"
    if request.sinks is not None and request.softcap is not None:
        return f"{name} has a softcap, or attention sinks, but not both; transformers:eager has"
    return None


def _refuses_sizes(package: Package, request: Request, arch: int | None) -> str | None:
    name, query, key, value = package.kernel, request.query, request.key, request.value
    size = size_that_fits(query.shape[3], value.shape[3])
    for tensor in (query, key, value):
        if tensor.dtype not in DTYPES:
            able = " and ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            return f"{name} computes in {able}, and this is {str(tensor.dtype).removeprefix('torch.')}; sdpa does any"
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        return f"{name} wants one dtype, not {query.dtype}, {key.dtype} and {value.dtype}"
    if query.shape[2] % key.shape[2]:
        return f"{name} wants each KV head to serve as many query heads, not {query.shape[2]} heads over {key.shape[2]}"
    if size > LARGEST:
        return (
            f"{name} has head sizes up to {LARGEST}, and this is {max(query.shape[3], value.shape[3])}; sdpa does any"
        )
    if arch is not None and arch not in package.arches:
        return f"{name} has no right backward on devices of compute capability {arch}.x; sdpa computes on all"
    deterministic = torch.are_deterministic_algorithms_enabled()
    if package is FLASH3 and deterministic and size > 192:
        return f"{name} has no deterministic backward for a head size of {size}; flash2 has"
    if package is FLASH4 and arch is not None:
        return _refuses_flash4(size, arch, request, deterministic)
    return None


def _refuses_flash4(size: int, arch: int, request: Request, deterministic: bool) -> str | None:
    """The limits that flash_attn/cute/interface.py asserts, device by device; backward is always wanted."""
    where = f"flash4 on devices of compute capability {arch}.x"
    if size > 128 and not (size == 256 and arch in (10, 11)):
        return f"{where} has no head size of {size}; flash2 has"
    if arch in (10, 11) and size == 256 and (request.softcap is not None or request.sinks is not None):
        return f"{where} has neither a softcap nor attention sinks for a head size of 256; flash2 has"
    if arch == 12 and request.sinks is not None:
        return f"{where} has no gradient of attention sinks; flash2 has"
    if arch == 12 and deterministic:
        return f"{where} has no deterministic backward; flash2 has"
    return None
