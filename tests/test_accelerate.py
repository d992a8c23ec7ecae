"""A loop with accelerate: rows, losses, gradient norms and weights of as many processes as there are groups."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from helpers import Selected, as_launched, run_once
from models import LLAMA
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from trainers import Collator, Stream, Texts, fsdp_on_cpus

import sp_attention
from sp_attention.integrations.accelerate import GroupAccelerator, data_loader, gather, gather_for_metrics
from sp_attention.launch import run_ranks

pytestmark = pytest.mark.slow

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
    model = LLAMA.build()
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


WAYS_OF = {1: ("shuffled", "workers", "fsdp2"), 2: tuple(WAYS)}


@pytest.mark.parametrize(("groups", "way"), [(groups, way) for groups, ways in WAYS_OF.items() for way in ways])
def test_a_loop_is_that_of_as_many_processes_as_there_are_groups(groups: int, way: str, selected: Selected) -> None:
    ways = selected("way", groups=groups)
    plain, sharded = (run_once(groups * size, run, ways, size, timeout=240) for size in (1, 2))
    for rank, found in enumerate(sharded):
        expected = plain[rank // 2][way]
        assert found[way]["seen"] == expected["seen"]
        assert found[way]["counted"] == expected["counted"]
        assert len(expected["norms"]) > 2
        for name in ("losses", "norms"):
            assert found[way][name] == pytest.approx(expected[name], rel=1e-6)
        torch.testing.assert_close(found[way]["weights"], expected["weights"], rtol=1e-6, atol=1e-9)


def counted() -> dict[str, Any]:
    as_launched()
    accelerator = Accelerator(cpu=True)
    model = LLAMA.build()
    handle = sp_attention.enable(model, backend="sdpa", sp_size=2)
    group = handle.data_parallel_rank
    rows = torch.arange(3) + 10 * group
    view = GroupAccelerator.of(accelerator, lambda: handle)
    found = {
        "gather": gather(accelerator, {"rows": rows, "number": torch.tensor(group)}, handle),
        "objects": gather_for_metrics(accelerator, [["a"], ["b", "c"]][group], handle, use_gather_object=True),
        "sum": view.reduce(torch.tensor([group + 1, 4])),
        "mean": view.reduce(torch.tensor([group + 1.0]), "mean"),
        "processes": (view.num_processes, view.process_index == dist.get_rank()),
    }
    with view.counting_groups():
        found["groups"] = (view.num_processes, view.process_index)
    loader = data_loader(accelerator, DataLoader(range(7), batch_size=2), handle)
    seen = [(batch.tolist(), gather_for_metrics(accelerator, batch, handle).tolist()) for batch in loader]
    found |= {"batches": [batch for batch, _ in seen], "metrics": [row for _, metrics in seen for row in metrics]}
    return found


def test_each_group_counts_once() -> None:
    for rank, found in enumerate(run_ranks(4, counted)):
        assert found["gather"]["rows"].tolist() == [0, 1, 2, 10, 11, 12]
        assert found["gather"]["number"].tolist() == [0, 1]
        assert found["objects"] == ["a", "b", "c"]
        assert found["sum"].tolist() == [3, 8]
        assert found["sum"].dtype == torch.int64
        assert found["mean"].tolist() == [1.5]
        assert found["processes"] == (4, True)
        assert found["groups"] == (2, rank // 2)
        # The last batch is filled up from the beginning, and metrics are without that.
        assert found["batches"] == ([[0, 1], [4, 5]], [[2, 3], [6, 0]])[rank // 2]
        assert found["metrics"] == list(range(7))
