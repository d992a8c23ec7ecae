"""A model under DeepSpeed: its engine, and what its weights are. Each rank calls `launched` first."""

import os
from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from helpers import as_launched
from torch import Tensor, nn


def launched() -> None:
    """What torchrun would have set, and DeepSpeed over the process group that there is."""
    as_launched()
    os.environ["DS_ACCELERATOR"] = "cpu"
    # It compiles a shared-memory collective for CPUs as soon as it starts, which training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def config(stage: int, accumulation: int = 1, **zero: Any) -> dict[str, Any]:
    """`zero`: settings of zero_optimization. Small models would not be partitioned without the threshold."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def zero(stage: int, accumulation: int = 1, **more: Any) -> Callable[[nn.Module], Any]:
    """What puts a model into an engine: call it with a batch, then `backward(loss)` and `step()`. SGD, rate 0.1."""

    def start(model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, accumulation, **more))[0]

    return start


def dtype_of(stage: int) -> torch.dtype:
    """float64 where DeepSpeed takes it. Gradients travel in float32 always.

    That is not in stage 0; in stage 3 not on CPUs that compute in float16: elsewhere it takes no notice of the dtype.
    """
    takes = stage in (1, 2) or (stage == 3 and not get_accelerator().is_fp16_supported())
    return torch.float64 if takes else torch.float32


def weights(model: nn.Module) -> Tensor:
    """All weights in a row, whole and in float64, on every rank."""
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return torch.cat([parameter.detach().double().flatten() for parameter in parameters])


def ranks_of_group(sp_size: int) -> tuple[int, int]:
    """How many groups there are, and which one is this rank's."""
    return dist.get_world_size() // sp_size, dist.get_rank() // sp_size
