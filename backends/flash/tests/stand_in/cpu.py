"""Let flash-attn's own Python, its operators and their autograd run on CPU tensors, over the stand-in extension."""

import sys
from pathlib import Path

import sp_attention_flash
import torch
from sp_attention_flash import refusing
from sp_attention_flash.packages import FLASH2

OPERATORS = ("_flash_attn_forward", "_flash_attn_varlen_forward", "_flash_attn_backward", "_flash_attn_varlen_backward")


def import_flash2() -> object:
    """flash_attn.flash_attn_interface, with its four operators on the CPU as well."""
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import flash_attn.flash_attn_interface as interface

    for name in OPERATORS:
        operator = getattr(interface, name)
        if "cpu" not in operator._backend_fns:
            operator.register_kernel("cpu")(operator._init_fn)
    return interface


def accept(*dtypes: torch.dtype) -> None:
    """Let the stand-in, and us, do more dtypes than flash-attn does. For processes that end with the test."""
    import flash_attn_2_cuda

    flash_attn_2_cuda.DTYPES.extend(dtypes)
    refusing.DTYPES = (*refusing.DTYPES, *dtypes)


def offer_flash2_on_the_cpu() -> None:
    """Let the installed plugin offer `flash` and `flash2` on the CPU. For processes that end with the test."""
    refusing.DEVICE = "cpu"
    sp_attention_flash.unusable = lambda package: None if package is FLASH2 else "not in this test"
