"""Stage long: the longest sequence that one device trains on, in Llama-8B's shapes with random weights in bfloat16.

A step is forward, loss and backward of one sequence, with the layers checkpointed and no optimizer; each length is
twice the one before, until memory or time is short. Memory is at most in the step, weights and gradients included.
Models of 4 of the 32 layers tell the memory of a length in an eighth of the time. Ranks that share the device, in the
second table, say what a rank takes, and nothing of the speed of several devices.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sp_attention
from gpu_stages import machine
from gpu_stages.models import device_of_rank
from gpu_stages.results import REFUSED, Results
from sp_attention.cli.benchmarks.training import deepspeed_tiled_mlps
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations

SHAPES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
REHEARSED: dict[str, Any] = SHAPES | {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Layers, and the lengths to try with so many.
LADDERS = ((4, [2**exponent for exponent in range(15, 22)]), (32, [2**exponent for exponent in range(15, 18)]))
REHEARSED_LADDERS = ((2, [256, 512]),)
# Of ranks that share the device: a Llama of 0.27 billion parameters.
SHARED: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
SEARCH, RANKS = "Longest sequence", "Ranks that share the device"
TILE = 2048
OUT = "out of memory"

Step = Callable[[Tensor], float]


@dataclass(frozen=True)
class Way:
    """asked: of `enable`, None for a model that is left as it is. step: makes the step, if it is not transformers'."""

    asked: dict[str, Any] | None = None
    step: Callable[[PreTrainedModel], Step] | None = None
    checkpoints: bool = True


def ways(rehearsed: bool) -> dict[str, Way]:
    """What is tried, and what is not to be had is not among it."""
    tile = 64 if rehearsed else TILE
    savers: dict[str, Any] = {"loss_tile": tile, "mlp_tile": tile}
    found = {
        "transformers alone": Way(),
        "sp_attention, loss in tiles": Way({"loss_tile": tile}),
        "sp_attention, loss and MLP in tiles": Way(savers),
        "sp_attention, tiles, offload": Way({**savers, "offload": True}),
        "sp_attention, tiles, head groups": Way({**savers, "head_groups": 4}),
        "sp_attention, tiles, offload, head groups": Way({**savers, "offload": True, "head_groups": 4}),
    }
    if find_spec("deepspeed"):
        found["DeepSpeed ALST"] = Way(step=alst, checkpoints=False)
    return found


def run(results: Results, device: torch.device) -> None:
    results.note(" ".join((__doc__ or "").split()))
    rehearsed = machine.is_stand_in(device)
    if find_spec("deepspeed") is None:
        results.note("DeepSpeed ALST is not among it: deepspeed is not installed.")
    for layers, lengths in REHEARSED_LADDERS if rehearsed else LADDERS:
        _search(results, device, layers, lengths)
    shapes, length = (REHEARSED, 256) if rehearsed else (SHARED, 16384)
    for ranks in (2,) if rehearsed else (2, 4):
        # One start of ranks for all rows.
        all_ways = cache(partial(_on_ranks, ranks, str(device), shapes, length, results.left))
        for name in SHARING:
            key = {"ranks": str(ranks), "": name, "tokens": str(length)}
            results.row(RANKS, key, partial(_worst, all_ways, name), needs=30.0)


def _search(results: Results, device: torch.device, layers: int, lengths: list[int]) -> None:
    rehearsed = machine.is_stand_in(device)
    left, needs = ways(rehearsed), {}
    for length in lengths:
        for name, way in list(left.items()):
            key = {"layers": str(layers), "": name, "tokens": str(length)}
            shapes = (REHEARSED if rehearsed else SHAPES) | {"num_hidden_layers": layers}
            row = results.row(SEARCH, key, partial(measured, shapes, length, way, device), needs.get(name, 5.0))
            if row["outcome"] != "done":
                del left[name]
                continue
            # Attention takes four times as long for twice the tokens, and there are a first step and another.
            needs[name] = 4.0 * row["seconds"]


def measured(shapes: dict[str, Any], length: int, way: Way, device: torch.device) -> dict[str, Any]:
    """Bytes at most in a step, and its seconds; or that memory was short, or why nothing is tried."""
    gc.collect()
    machine.forget(device)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**shapes, max_position_embeddings=length)).to(torch.bfloat16).train()
            ids = torch.randint(shapes["vocab_size"], (1, length))
        step = _step(model, way)
        machine.forget(device)
        seconds = machine.seconds_of(partial(step, ids), device, times=1, warm=False)
        return {"outcome": "done", "peak MiB": machine.peak(device) // 2**20, "seconds": round(seconds, 2)}
    except torch.OutOfMemoryError:
        return {"outcome": OUT, "peak MiB": machine.peak(device) // 2**20}
    except (sp_attention.UnsupportedError, ValueError) as error:
        return {"outcome": f"{REFUSED}: {error}"}
    finally:
        model = step = None  # type: ignore[assignment]
        gc.collect()


def _step(model: PreTrainedModel, way: Way) -> Step:
    if way.asked is not None:
        sp_attention.enable(model, "auto", **way.asked)
    if way.checkpoints:
        checkpoint_activations(model)
    return way.step(model) if way.step is not None else partial(_plain, model)


def _plain(model: PreTrainedModel, ids: Tensor) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def alst(model: PreTrainedModel) -> Step:
    """DeepSpeed's Arctic Long Sequence Training on one rank: MLP and loss in its tiles, inputs of layers offloaded.

    Bekman et al. 2025 (arXiv 2506.13996), section 3. Its offload of checkpoints is a script's; torch's `save_on_cpu`
    around re-entrant checkpoints, which save nothing else, stands in for it.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    checkpoint_activations(model, {"use_reentrant": True})
    deepspeed_tiled_mlps(model)
    base: Any = model.get_decoder()
    head: Any = model.get_output_embeddings()

    def tile_loss(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(x).float(), y, reduction="sum")  # DeepSpeed has made rows of them

    def step(ids: Tensor) -> float:
        targets = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
        with torch.autograd.graph.save_on_cpu() if ids.is_cuda else nullcontext():
            hidden = base(input_ids=ids, use_cache=False).last_hidden_state
        tiles = ceil(hidden.shape[1] / TILE)
        loss = TiledFusedLogitsLoss.apply(tile_loss, model, hidden, targets, None, tiles, [head.weight], "sum")
        loss.backward()
        return float(loss.detach())

    return step


# Of ranks that share the device.
SHARING = {
    "as it comes": Way({}, checkpoints=False),
    "checkpointed": Way({}),
    "checkpointed, MLP in tiles, offload": Way({"offload": True, "mlp_tile": TILE}),
}


def _worst(everyone: Callable[[], list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """The row of a way on the rank that takes most, or on one that refuses it."""
    return max((found[name] for found in everyone()), key=lambda row: row.get("peak MiB", float("inf")))


def _on_ranks(ranks: int, kind: str, shapes: dict[str, Any], length: int, left: float) -> list[dict[str, Any]]:
    return run_ranks(ranks, _of_rank, kind, shapes, length, timeout=left)


def _of_rank(kind: str, shapes: dict[str, Any], length: int) -> dict[str, Any]:
    """By way what came of it on this rank."""
    device = device_of_rank(kind)
    torch.manual_seed(0)
    return {name: measured(shapes | {"num_hidden_layers": 4}, length, way, device) for name, way in SHARING.items()}
