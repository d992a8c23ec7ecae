"""Run as a program: checks of the kit on flash-attn's Triton kernels, in Triton's interpreter; prints what is wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "stand_in"))

import cpu
from sp_attention_flash import backend, refusing
from sp_attention_flash.packages import FLASH2

from sp_attention import Request, testing


def main(features: list[str]) -> None:
    interface = cpu.import_flash2()
    assert interface.flash_attn_gpu.__name__ == "flash_attn.flash_attn_triton_amd.interface_fa"
    refusing.DEVICE, refusing.DTYPES = "cpu", (torch.float32,)
    offered = backend("flash2", FLASH2, 0, None)

    def attend(request: Request) -> Tensor:
        # These kernels read the output and its gradient with the same strides, and the output has those of the queries.
        return offered.attend(replace(request, query=request.query.contiguous()))

    kernel = replace(offered, attend=attend)
    answers = {feature: testing.check(kernel, feature, dtype=torch.float32, tolerance=1e-5) for feature in features}
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
