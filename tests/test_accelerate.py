"""A loop with accelerate: rows, losses, gradient norms and weights of as many processes as there are groups."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from models import MODELS
from test_trainer import Collator, Stream, Texts, as_launched, fsdp_on_cpus
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import sp_attention
from sp_attention.integrations.accelerate import data_loader, gather_for_metrics
from sp_attention.launch import run_ranks

ACCUMULATION, EPOCHS = 3, 2

# What each way gives to the loader, and how the model is sharded.
WAYS: dict[str, dict[str, Any]] = {
    "in order": {},
    "shuffled": {"shuffle": True},
    "streamed": {"dataset": Stream()},
    "workers": {"num_workers": 2, "noise": True, "shuffle": True},
    "resumed": {"shuffle": True, "skip": 3},
    "fsdp2": {"engine": "fsdp2"},
    "hsdp": {"engine": "hsdp"},
}


def accelerator_for(engine: str | None, sp_size: int) -> Accelerator:
    # On several processes accelerate would read a stream on one of them.
    common: dict[str, Any] = {
        "cpu": True,
        "gradient_accumulation_steps": ACCUMULATION,
        "dataloader_config": DataLoaderConfiguration(dispatch_batches=False),
    }
    if engine is None or sp_size == 1:  # Against no engine, or DDP.
        return Accelerator(**common)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    groups = dist.get_world_size() // sp_size
    config = ParallelismConfig(dp_replicate_size=groups, dp_shard_size=sp_size) if engine == "hsdp" else None
    with fsdp_on_cpus():
        return Accelerator(**common, fsdp_plugin=plugin, parallelism_config=config)


def loop(way: dict[str, Any], sp_size: int) -> dict[str, Any]:
    """Two epochs: the rows that this rank saw and those of all, each batch's loss, each step's norm, the weights."""
    options = dict(way)
    engine, skip = options.pop("engine", None), options.pop("skip", 0)
    noise, dataset = options.pop("noise", False), options.pop("dataset", Texts())
    AcceleratorState._reset_state(reset_partial_state=True)  # which all accelerators of a process share
    set_seed(5)
    accelerator = accelerator_for(engine, sp_size)
    assert accelerator.is_fsdp2 == (engine is not None and sp_size > 1)
    model = MODELS["llama-6q3kv"].build()
    loader: Any = DataLoader(dataset, batch_size=2, collate_fn=Collator(noise), **options)
    handle = None
    if sp_size > 1:
        group = {"group": accelerator.torch_device_mesh["dp_shard"]} if engine == "hsdp" else {"sp_size": sp_size}
        handle = sp_attention.enable(model, backend="sdpa", **group)
        loader = data_loader(accelerator, loader, handle)
        assert accelerator.prepare(loader) is loader
    else:
        loader = accelerator.prepare(loader)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    seen, losses, norms, counted = [], [], [], []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, skip) if epoch == 0 and skip else loader:
            rows = batch["input_ids"].sum(1)
            seen += rows.tolist()
            every = gather_for_metrics(accelerator, rows, handle) if handle else accelerator.gather_for_metrics(rows)
            counted += every.tolist()
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    weights = [each.full_tensor() if isinstance(each, DTensor) else each for each in model.parameters()]
    return {
        "seen": seen,
        "counted": counted,
        "losses": losses,
        "norms": norms,
        "weights": torch.cat([each.detach().flatten() for each in weights]),
    }


def run(ways: tuple[str, ...], sp_size: int) -> dict[str, dict[str, Any]]:
    as_launched()
    return {name: loop(WAYS[name], sp_size) for name in ways}


@cache
def runs(groups: int, sp_size: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(groups * sp_size, run, WAYS_OF[groups], sp_size, timeout=240)


WAYS_OF = {1: ("shuffled", "workers", "fsdp2"), 2: tuple(WAYS)}


@pytest.mark.parametrize(("groups", "way"), [(groups, way) for groups, ways in WAYS_OF.items() for way in ways])
def test_a_loop_is_that_of_as_many_processes_as_there_are_groups(groups: int, way: str) -> None:
    plain, sharded = runs(groups, 1), runs(groups, 2)
    for rank, found in enumerate(sharded):
        expected = plain[rank // 2][way]
        assert found[way]["seen"] == expected["seen"]
        assert found[way]["counted"] == expected["counted"]
        assert len(expected["norms"]) > 2
        for name in ("losses", "norms"):
            assert found[way][name] == pytest.approx(expected[name], rel=1e-6)
        torch.testing.assert_close(found[way]["weights"], expected["weights"], rtol=1e-6, atol=1e-9)
