"""Stage flash: every kernel that is installed, through the kit: output and every gradient, feature by feature.

Beside the library's own and its plugins', trials of what torch has: its flex attention and its varlen attention, called
as a plugin would (`trials.py`). Head sizes 64 to 256 are features of their own.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from gpu_stages import machine, trials
from gpu_stages.results import CANNOT, NOT_RUN, REFUSED, Results, told
from sp_attention import testing
from sp_attention.cli.machine import installed
from sp_attention.kernels import registry
from sp_attention.kernels.request import Backend, Request

# By priority: what people train with.
DTYPES = (torch.bfloat16, torch.float16)
SIZES = (64, 96, 128, 192, 256)
# Kernels of packages, and what is installed of these.
PACKAGES = {
    "flash2": "flash-attn",
    "flash3": "flash_attn_3",
    "flash4": "flash-attn-4",
    "transformers:kernels-community/flash-attn2": "kernels",
}
# What a rehearsal does of all features.
REHEARSED = ("causal", "sliding window", "packed documents", "left padding", "grouped KV heads", "head size 64")
# Trials are compiled for each, so they are given what is asked of them first.
TRIED = (*REHEARSED[:-1], "softcap", "additive bias", *(f"head size {size}" for size in SIZES))


def _sized(size: int, window: int | None) -> Request:
    shape = testing.Shape(137, 137, 6, 3, size, size)
    mask = replace(testing.FEATURES["causal"]().mask, query_length=137, key_length=137, window=window)
    return testing.request(mask, shape, scale=size**-0.5)


# Requests by name that the kit has not.
SIZED: dict[str, Callable[[], Request]] = {f"head size {size}": partial(_sized, size, None) for size in SIZES}
SIZED |= {f"head size {size}, sliding window": partial(_sized, size, 50) for size in SIZES}


def run(results: Results, device: torch.device) -> None:
    results.note(" ".join((__doc__ or "").split()))
    rehearsed = machine.is_stand_in(device)
    long = [] if rehearsed else [*testing.LONG]
    # The kit finds its requests there; this process has nothing else to do with it.
    testing.LONG.update(SIZED)
    kernels = [backend for backend in _backends(results, device) if _is_called(results, backend, device)]
    trial = [backend for backend in trials.backends(device) if _is_called(results, backend, device)]
    some = REHEARSED if rehearsed else [*testing.FEATURES, *SIZED]
    first, second = DTYPES
    for dtype, backends, features in (
        (first, kernels, some),
        (first, trial, REHEARSED if rehearsed else TRIED),
        (second, kernels, some),
        (first, kernels, long),
        (second, kernels, long),
    ):
        for backend in backends:
            for feature in features:
                key = {"feature": feature, "dtype": str(dtype).removeprefix("torch.")}
                results.row(backend.kernel, key, partial(_checked, backend, feature, device, dtype))


def _backends(results: Results, device: torch.device) -> list[Backend]:
    """Those to run, packages of flash-attn first. Why others are not run is a row each.

    A package that is installed is run though its plugin does not offer it here, to learn whether it still should not.
    """
    found = {backend.kernel: backend for backend in registry.usable(device.type)}
    found.pop("transformers:eager", None)  # which is a model's, and is run by stage models
    found.pop("flash", None)  # which is one of the others
    entries = {entry.backend.kernel: entry for entry in registry.load().backends}
    for name, distribution in PACKAGES.items():
        if name in found:
            continue
        reason = entries[name].problem if name in entries else "its plugin, sp-attention-flash, is not installed"
        if machine.is_stand_in(device):
            found[name] = Backend(device.type, f"{name}, a stand-in", testing.attend)
        elif name in entries and installed(distribution) is not None:
            results.note(f"{name} is run though it is not offered here: {reason}.")
            found[name] = replace(entries[name].backend, kernel=f"{name}, not offered here")
        else:
            results.row("Packages", {"kernel": name}, partial(dict, outcome=f"{NOT_RUN}: {reason}"))
    first = [name for name in PACKAGES if name in found]
    return [found[name] for name in (*first, *(name for name in found if name not in first))]


def _is_called(results: Results, backend: Backend, device: torch.device) -> bool:
    """Whether it can be called at all: a kernel of the Hub is fetched then, and others are compiled."""

    def call() -> dict[str, str]:
        request = testing.request_for("head size 64", device=device, dtype=DTYPES[0])
        try:
            backend.attend(request)
            machine.synchronize(device)
        except (ImportError, OSError) as error:
            return {"outcome": f"{CANNOT}: {told(error)}"}
        return {"outcome": "called"}

    return bool(results.row("Packages", {"kernel": backend.kernel}, call)["outcome"] == "called")


def _checked(backend: Backend, feature: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    found, text = testing.outcome(backend, feature, device=device, dtype=dtype)
    if "CUDA error" in text:
        raise RuntimeError(text)
    return {"outcome": {testing.RIGHT: "right", testing.REFUSED: f"{REFUSED}: {text}"}.get(found, f"wrong: {text}")}
