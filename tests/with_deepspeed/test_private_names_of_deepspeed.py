"""DeepSpeed's names that we rely on and that nobody promises us: docs/private-names.md."""

import math
from typing import Any

import pytest
from private_names import Check, names_of, takes, thing_called
from torch import nn
from zero import config, launched

from sp_attention.launch import run_ranks

ALST = "deepspeed.runtime.sequence_parallel.ulysses_sp"


def partitioned(shape: tuple[int, int]) -> Any:
    """A parameter of ZeRO-3, in a group of one rank."""
    import deepspeed

    launched()
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        return nn.Linear(*reversed(shape)).weight


def told(name: str, shape: tuple[int, int]) -> tuple[Any, list[int]]:
    """What the name stands for in a parameter, as text where it is no number; the ranks of its group."""
    import torch.distributed as dist

    parameter = partitioned(shape)
    value = thing_called(name, {"deepspeed.zero.Init": lambda: parameter})
    is_group = isinstance(value, dist.ProcessGroup)
    return (None, dist.get_process_group_ranks(value)) if is_group else (value, [])


SHAPE = (6, 4)
# What each is of a partitioned parameter of this shape: a value, or the ranks of a group.
IN_PARAMETERS: dict[str, tuple[Any, list[int]]] = {
    "deepspeed.zero.Init.ds_numel": (math.prod(SHAPE), []),
    "deepspeed.zero.Init.ds_process_group": (None, [0]),
    "deepspeed.zero.Init.ds_shape": (SHAPE, []),
}


def is_made_and_registered(attention: Any) -> None:
    shape = ("batch_size", "attn_head_count", "attn_head_size", "kv_head_count", "num_hidden_layers")
    takes("attn", *shape, "process_group", also=("seq_length_is_variable",))(attention)
    takes("model_name_or_path", "core_attn_implementation", "sequence_parallel_size", "micro_batch_size")(
        attention.register_with_transformers
    )


def is_applied(*arguments: str) -> Check:
    return lambda function: takes("ctx", *arguments)(function.forward)


CHECKS: dict[str, Check] = {
    f"{ALST}.TiledFusedLogitsLoss": is_applied("fn", "self", "x", "y", "mask", "shards", "compute_params"),
    f"{ALST}.TiledMLP": is_applied("fn", "self", "x", "shards", "compute_params"),
    f"{ALST}.UlyssesSPAttentionHF": is_made_and_registered,
}


@pytest.mark.parametrize("name", CHECKS)
def test_is_as_we_use_it(name: str) -> None:
    CHECKS[name](thing_called(name, {}))


@pytest.mark.parametrize("name", IN_PARAMETERS)
def test_parameters_have_it(name: str) -> None:
    assert run_ranks(1, told, name, SHAPE, timeout=120) == [IN_PARAMETERS[name]]


def test_every_name_of_the_table_is_checked() -> None:
    assert sorted([*CHECKS, *IN_PARAMETERS]) == names_of("deepspeed")
