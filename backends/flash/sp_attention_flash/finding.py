"""Which flash-attn packages can be used here, and for those that cannot: why, and the cure.

Asked whenever kernels are listed, so nothing is imported that is not compiled: flash-attn-4 takes seconds to import.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

import torch
from packaging.version import Version

from sp_attention_flash.packages import FLASH2, FLASH3, FLASH4, Package


def unusable(package: Package) -> str | None:
    """Why a package cannot be used on this machine, with the cure; None when it can."""
    try:
        installed = version(package.distribution)
    except PackageNotFoundError:
        return f"{package.distribution} is not installed: {package.cure}"
    if Version(installed) < Version(package.oldest):
        return f"{package.distribution} {installed} is older than {package.oldest}: {package.cure}"
    if package is FLASH4 and _overwritten(package.distribution):
        return f"{package.distribution} is overwritten by an older package: {package.cure} --force-reinstall --no-deps"
    if torch.version.hip is not None:
        return "flash-attn for ROCm has kernels of its own, which are not covered yet: use sdpa"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a torch with it, then {package.cure}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: look at what nvidia-smi says"
    arch = torch.cuda.get_device_capability()[0]
    if arch not in package.arches:
        return f"{package.distribution} has no right backward for {torch.cuda.get_device_name()}: use flash or sdpa"
    if package.extension is not None:
        try:
            import_module(package.extension)
        except (ImportError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            built = f"{package.distribution} {installed} does not load ({first}): it is built for another torch"
            return f"{built}; {package.cure}"
    return None


def _overwritten(distribution: str) -> bool:
    """Whether its interface is not the file it came with: flash-attn 2.8 has an older one in the same place."""
    interface = next(file for file in files(distribution) or () if file.name == "interface.py")
    return interface.size != Path(str(interface.locate())).stat().st_size


def best(usable: list[Package]) -> Package | None:
    """The package that was written for this device, else one that runs on it."""
    blackwell = FLASH4 in usable and torch.cuda.get_device_capability()[0] >= 10
    order = (FLASH4, FLASH2, FLASH3) if blackwell else (FLASH3, FLASH2, FLASH4)
    return next((package for package in order if package in usable), None)
