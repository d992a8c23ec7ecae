"""Physical memory of this process, from Linux itself.

psutil tells what is resident now, but neither the most that was, nor how to count that anew.
"""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def resident_memory(field: str) -> int:
    """Bytes of physical memory of this process, "VmRSS" now or "VmHWM" at most; where Linux does not tell, at most."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let "VmHWM" be what it is at most from now on; where Linux does not allow it, it stays as it is."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
