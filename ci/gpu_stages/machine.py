"""What a result says of the machine that it came of, and what differs between a device and its stand-in."""

import datetime
import platform
import shutil
import subprocess
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sp_attention.cli.machine import PACKAGES, installed
from sp_attention.cli.rss import forget_peak, resident_memory

OTHERS = ("liger-kernel", "flash-linear-attention", "fla-core", "causal-conv1d", "nvidia-cutlass-dsl", "quack-kernels")
ROOT = Path(__file__).parents[2]


def today() -> str:
    return f"{datetime.date.today():%Y-%m-%d}"


def device_named(name: str | None) -> torch.device | None:
    """The device that is asked for; by default this machine's accelerator, None where it has none."""
    return torch.accelerator.current_accelerator(check_available=True) if name is None else torch.device(name)


def is_stand_in(device: torch.device) -> bool:
    """A CPU stands in for an accelerator."""
    return device.type == "cpu"


def name_of(device: torch.device) -> str:
    return "CPU" if is_stand_in(device) else str(torch.get_device_module(device).get_device_name())


def facts(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and date, by name."""
    found: dict[str, Any] = {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"}
    found["device"] = name_of(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"devices": torch.cuda.device_count(), "compute capability": f"{major}.{minor}", "driver": _driver()}
    versions = {package: installed(package) for package in ("sp-attention", *PACKAGES, *OTHERS)}
    found |= {"Python": platform.python_version(), "CUDA of torch": torch.version.cuda or "none"}
    found |= {name: version for name, version in versions.items() if version is not None}
    return found | {"torch": torch.__version__, "commit": _told("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")}


def _driver() -> str:
    return _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]


def _told(*command: str) -> str:
    """What a program prints; "unknown" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.strip() if ran.returncode == 0 else "unknown"


def synchronize(device: torch.device) -> None:
    if not is_stand_in(device):
        torch.get_device_module(device).synchronize()


def forget(device: torch.device) -> int:
    """Count memory at most anew, from what is held now, in bytes; resident memory where the CPU stands in."""
    if is_stand_in(device):
        forget_peak()
        return resident_memory("VmRSS")
    module = torch.get_device_module(device)
    module.empty_cache()
    module.reset_peak_memory_stats()
    return int(module.memory_allocated())


def peak(device: torch.device) -> int:
    """Bytes held at most since `forget`."""
    if is_stand_in(device):
        return resident_memory("VmHWM")
    return int(torch.get_device_module(device).max_memory_allocated())


def seconds_of(step: Any, device: torch.device, times: int = 3, warm: bool = True) -> float:
    """The fastest of some calls; after a first one, if it is to be warm."""
    if warm:
        step()
    found = []
    for _ in range(times):
        synchronize(device)
        start = perf_counter()
        step()
        synchronize(device)
        found.append(perf_counter() - start)
    return min(found)
