"""Run as a program: lets flash-attn-4 compile what we call it with, for one architecture, without a device.

Its documented mode for machines without one: fake CUDA tensors, and FLASH_ATTENTION_ARCH, CUTE_DSL_ARCH and
FLASH_ATTENTION_NUM_SMS in the environment. Nothing is computed. Prints the shapes that come back for each call, or the
error.
"""

import json
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent / "stand_in"))  # flash_attn imports its extension first

from sp_attention_flash.packages import FLASH4, Options, call

from sp_attention.kernels.varlen import Pattern, Sequences

WINDOW = Pattern(True, 7, 0)


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def main() -> None:
    found = {}
    with torch.no_grad(), FakeTensorMode():
        edges, sinks = fake(3, dtype=torch.int32), fake(4, dtype=torch.float32)
        cut = Sequences(WINDOW, None, None, edges, edges, 64, 64)
        calls = {
            "causal, softcap": (Pattern(True), None, Options(0.3, softcap=2.0), 64, torch.bfloat16),
            "window, sinks": (WINDOW, None, Options(0.3, sinks=sinks), 64, torch.float16),
            "window on both sides": (Pattern(False, 7, 7), None, Options(0.3), 64, torch.bfloat16),
            "sequences, window, sinks": (WINDOW, cut, Options(0.3, sinks=sinks), 64, torch.bfloat16),
            "float32": (Pattern(True), None, Options(0.3), 64, torch.float32),
            "head size 512": (Pattern(True), None, Options(0.3), 512, torch.bfloat16),
        }
        for name, (pattern, sequences, options, size, dtype) in calls.items():
            leading = (2, 64) if sequences is None else (128,)
            q, k, v = (fake(*leading, heads, size, dtype=dtype) for heads in (4, 2, 2))
            try:
                out, lse = call(FLASH4, q, k, v, pattern, sequences, options, lse=True)
                found[name] = [list(out.shape), str(out.dtype), list(lse.shape)]
            except AssertionError as error:
                found[name] = str(error)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
