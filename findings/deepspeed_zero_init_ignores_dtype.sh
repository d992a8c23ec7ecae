#!/usr/bin/env bash
# deepspeed 0.19.8 (torch 2.13.0, CPU): zero.Init(dtype=torch.float32) makes bfloat16 weights on a CPU without float16.
#
# The dtype that is asked for is looked at only where the accelerator says that it has float16; elsewhere weights become
# bfloat16 whatever is asked for, without a word. Whether a CPU says so depends on its instructions (oneDNN's float16), so
# one script trains in float32 on one machine and in bfloat16 on another; and float64, which is taken (and made bfloat16)
# on the one, is an error on the other. What the accelerator says is set here, so that both are seen on any machine.
#
# Seen, of a layer that is made within zero.Init, stage 3, one process, gloo:
#   float16 supported: False, asked for torch.float32: torch.bfloat16
#   float16 supported: False, asked for torch.float64: torch.bfloat16
#   float16 supported: True, asked for torch.float32: torch.float32
#   float16 supported: True, asked for torch.float64: AssertionError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools wheel
"$folder/venv/bin/pip" install --quiet --no-build-isolation deepspeed==0.19.8
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import os

os.environ |= {
    "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
}
import deepspeed
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator

# Otherwise it compiles a collective for CPUs that is not used here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("ERROR")
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
config = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
seen = {}
for has in (False, True):
    get_accelerator().is_fp16_supported = lambda has=has: has
    for asked in (torch.float32, torch.float64):
        try:
            with deepspeed.zero.Init(dtype=asked, config_dict_or_path=config):
                seen[has, asked] = str(torch.nn.Linear(4, 4).weight.dtype)
        except AssertionError:
            seen[has, asked] = "AssertionError"
        print(f"float16 supported: {has}, asked for {asked}: {seen[has, asked]}")
expected = ["torch.bfloat16", "torch.bfloat16", "torch.float32", "AssertionError"]
assert list(seen.values()) == expected
PYTHON
