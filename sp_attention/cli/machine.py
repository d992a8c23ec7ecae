"""What is installed on this machine, and what it has; nothing broken in it is raised."""

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "accelerate", "deepspeed", "flash-attn", "flash-attn-3", "flash-attn-4", "kernels",
    "triton", "torch-npu",
)  # fmt: skip
# Of a process group, and of what hides devices. Addresses are left out: reports are pasted where everyone reads them.
ENVIRONMENT = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)  # fmt: skip
# Where CANN is, set by its set_env.sh, else by default: docs of torch_npu.utils.get_cann_version, and of CANN's
# quick installation for the file with its version.
CANN = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")

Facts = dict[str, Any]


def facts() -> Facts:
    """By name: plain strings, numbers, lists and dicts, None for what is not there."""
    problem = import_problem("torch")
    return {
        "sp_attention": version("sp-attention"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "torch": {"problem": problem} | (_torch() if problem is None else {}),
        "cann": _cann(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def installed(package: str) -> str | None:
    """The version of a distribution, from what its installation wrote: it may be broken, and is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def import_problem(module: str) -> str | None:
    """Why a module cannot be imported; None when it can."""
    try:
        import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of torch too: it loads what other packages add to it
        cause = f" Because of {_told(error.__cause__)}" if error.__cause__ is not None else ""
        return _told(error) + cause
    return None


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _torch() -> Facts:
    import torch
    import torch.distributed as dist

    groups = [name for name in dist.Backend.backend_list if name != "undefined"] if dist.is_available() else []
    found: Facts = {
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "threads": torch.get_num_threads(),
        "process_groups": [name for name in groups if name != "fake" and dist.is_backend_available(name)],
        "devices": [],
        "devices_problem": None,
    }
    try:
        found["devices"] = _devices()
        if torch.version.cuda is not None and not found["devices"]:
            torch.cuda.init()  # says why there is none
    except Exception as error:  # of a driver, for one, that is too old
        found["devices_problem"] = _told(error)
    return found


def _devices() -> list[Facts]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator)
    # Not every kind of device has them: mps has not.
    properties = getattr(module, "get_device_properties", lambda index: None)
    found = []
    for index in range(torch.accelerator.device_count()):
        known = properties(index)
        described = {name: getattr(known, name, None) for name in ("name", "total_memory", "major", "minor")}
        found.append({"type": accelerator.type, "index": index} | described)
    return found


def _cann() -> Facts | None:
    """The version that the toolkit's installation wrote, and where; None without a toolkit."""
    homes = [os.environ.get(name) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")]
    for home in [*filter(None, homes), *CANN]:
        for file in sorted(Path(home).glob("*-linux/ascend_toolkit_install.info")):
            lines = file.read_text(errors="replace").splitlines()
            versions = [line.removeprefix("version=") for line in lines if line.startswith("version=")]
            return {"version": versions[0] if versions else None, "home": home}
    return None
