"""Of stage exchange: peak memory of a step with FSDP2 on one device, beside the same model without."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_stages import machine
from gpu_stages.long import REHEARSED, SHARED
from gpu_stages.results import Results


def run(results: Results, device: torch.device) -> None:
    for sharded in (False, True):
        results.row("FSDP2 on one device", {"": "FSDP2" if sharded else "without"}, partial(_measured, sharded, device))


def _measured(sharded: bool, device: torch.device) -> dict[str, Any]:
    rehearsed = machine.is_stand_in(device)
    shapes = (REHEARSED if rehearsed else SHARED) | {"num_hidden_layers": 2 if rehearsed else 4}
    length = 256 if rehearsed else 8192
    dist.init_process_group("gloo" if rehearsed else None, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(LlamaConfig(**shapes, max_position_embeddings=length)).to(torch.bfloat16)
            ids = torch.randint(shapes["vocab_size"], (1, length))
        if sharded:
            mesh = init_device_mesh(device.type, (1,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        machine.forget(device)
        step = partial(_step, model.train(), ids)
        seconds = machine.seconds_of(step, device, times=1)
        return {"outcome": "done", "peak MiB": machine.peak(device) // 2**20, "ms": seconds * 1e3}
    finally:
        dist.destroy_process_group()


def _step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
