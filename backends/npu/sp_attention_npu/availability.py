"""Why the kernel cannot be used here, and the cure. Imports nothing, and starts no device that has not been started."""

import ctypes
import sys
from importlib.util import find_spec

import torch

# The libraries of CANN that torch-npu is linked against: the first that its import fails without, and the runtime.
CANN = ("libhccl.so", "libascendcl.so")


def unavailable() -> str | None:
    """None where NPUs can be used, else the reason, with the cure."""
    if find_spec("torch_npu") is None:
        version = torch.__version__.split("+")[0]
        return f"torch-npu is not installed: pip install torch-npu of the same version as torch, which is {version}"
    if "torch_npu" not in sys.modules:
        missing = next(filter(None, map(_missing, CANN)), None)
        if missing is not None:
            return (
                f"torch-npu is installed, and Ascend's CANN is not found ({missing}): source its set_env.sh, or "
                "uninstall torch-npu; until then `import torch` needs TORCH_DEVICE_BACKEND_AUTOLOAD=0, and "
                "transformers cannot be imported"
            )
        return "torch-npu is not imported: unset TORCH_DEVICE_BACKEND_AUTOLOAD, or import torch_npu before sp_attention"
    if not torch.get_device_module("npu").is_available():
        return "torch-npu finds no NPU: see `npu-smi info`, and the variable ASCEND_RT_VISIBLE_DEVICES"
    return None


def _missing(library: str) -> str | None:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None
