"""Stage models: whole models on ranks that share the device, against one process.

Ranks talk through gloo, which takes tensors through the host: NCCL wants a device for each rank. Compared are the loss
and every gradient of a step with those of one process in float64 with the same weights, relative to the largest number
of each; in float32 where float64 gives no numbers, and where fla's kernels run, which do not take it. An error may be
twice that of one process in the same dtype: where that is large, a row says little, and the rows in float64 say more.
Experts are all chosen, since rounding may choose others. The kernel is the one that `auto` took.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from gpu_stages import machine
from gpu_stages.results import ENDED, FAILED, NOT_RUN, REFUSED, RIGHT, WRONG, Results, load, peek, told
from sp_attention.cli.comparison import TOLERANCES
from sp_attention.cli.differences import largest_error
from sp_attention.cli.reduced import prepare
from sp_attention.launch import RanksError, run_ranks
from sp_attention.region.versions import checkpoint_activations

# Tokens of a sequence, and up to how many `enable` proves.
TABLE, LENGTH, LONGEST = "Whole models", 33, 64
STEPS = ("left-padded", "packed", "plain")
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 4}
# fla's kernels want heads of some size; dense MLPs, since experts are not what is asked here.
DELTA = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "mlp_only_layers": [*range(8)]}


@dataclass(frozen=True)
class Way:
    """How a model trains: what `enable` is asked for, and whether its layers are checkpointed."""

    asked: dict[str, Any] = field(default_factory=dict)
    checkpoints: bool = False


@dataclass(frozen=True)
class Model:
    """A type of models of transformers, and settings of its small model."""

    type: str
    settings: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "Llama": Model("llama"),
    "Mistral, window": Model("mistral"),
    "Gemma 2, softcap, head size 256": Model("gemma2", {"head_dim": 256}),
    "Gemma 3, window, head size 256": Model("gemma3_text", {"head_dim": 256}),
    "gpt-oss, sinks": Model("gpt_oss", EXPERTS),
    "Qwen3-MoE": Model("qwen3_moe", EXPERTS),
    "Qwen3-Next, delta nets": Model("qwen3_next", DELTA),
}
# Of Llama besides.
OPTIONS = {
    "tiles": Way({"loss_tile": 8, "mlp_tile": 8}),
    "checkpointed": Way(checkpoints=True),
    "checkpointed, offload": Way({"offload": True}, checkpoints=True),
}
# Ranks and dtypes, what people train with first.
PARTS = ((2, "bfloat16"), (4, "bfloat16"), (3, "bfloat16"), (2, "float64"))
REHEARSED = ((2, "bfloat16"),)
# Seconds under which no more ranks are started.
START = 30.0

Step = Callable[[PreTrainedModel], dict[str, Tensor]]


def run(results: Results, device: torch.device) -> None:
    results.note(" ".join((__doc__ or "").split()))
    results.note(f"fla is {'there' if find_spec('fla') else 'not there: delta nets are transformers own functions'}.")
    for ranks, dtype in REHEARSED if machine.is_stand_in(device) else PARTS:
        while left := [name for name in MODELS if results.find(TABLE, _key(ranks, name, dtype)) is None]:
            if results.left < START:
                for name in left:
                    results.add(TABLE, _key(ranks, name, dtype), {"outcome": f"{NOT_RUN}: the deadline is too near"})
                break
            try:
                run_ranks(ranks, of_rank, str(device), results.file, left, dtype, timeout=results.left)
            except RanksError as error:
                _blame(load(results.file), _key(ranks, left[0], dtype), error)
            results.tables = load(results.file).tables


def _blame(results: Results, first: dict[str, str], error: RanksError) -> None:
    """Say in the row that was under way what ranks said; in the first where not even that came to its beginning."""
    rows = results.tables.get(TABLE, [])
    lost = next((row for row in rows if row.get("outcome", "").startswith(ENDED)), None) or results.add(
        TABLE, first, {"outcome": f"{ENDED} before it"}
    )
    lost["outcome"] = f"{FAILED}: {' '.join(str(error).split())[-400:]}"
    results.write()


def _key(ranks: int, name: str, dtype: str) -> dict[str, str]:
    return {"ranks": str(ranks), "model": name, "dtype": dtype}


def of_rank(kind: str, file: Path, names: list[str], dtype: str) -> None:
    """On each rank: the first of them writes a row for each model, of what all have found."""
    device = device_of_rank(kind)
    results = peek(file)
    for name in names:
        measure = partial(_measured, name, getattr(torch, dtype), device)
        row = measure() if dist.get_rank() else results.row(TABLE, _key(dist.get_world_size(), name, dtype), measure)
        if any("CUDA error" in str(value) for value in row.values()):
            raise RuntimeError(f"{name}: the device does nothing more for this process")


def device_of_rank(kind: str) -> torch.device:
    """This rank's, which is now the current one; ranks take turns of those that there are."""
    transformers.logging.set_verbosity_error()
    device = torch.device(kind)
    if machine.is_stand_in(device):
        return device
    module = torch.get_device_module(device)
    device = torch.device(device.type, dist.get_rank() % module.device_count())
    module.set_device(device)
    return device


def _measured(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What came of each step on the rank where it is worst."""
    everyone: list[Any] = [None] * dist.get_world_size()
    try:
        mine = compared(MODELS[name], dtype, device)
    except Exception as error:  # it is told by the rank that writes, and other models go on
        mine = {"outcome": (float("inf"), f"{FAILED}: {told(error)}")}
    dist.all_gather_object(everyone, mine)
    worst = [{step: each[step] for step in each} for each in everyone]
    steps = dict.fromkeys(step for each in worst for step in each)
    return {step: max(each[step] for each in worst if step in each)[1] for step in steps}


def compared(model: Model, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[float, str]]:
    """By step how bad it is on this rank, and in words."""
    settings = dict(model.settings)
    made, batches = prepare(model.type, "causal-lm", LENGTH, settings)
    whole = nn.Module.to(made, device, dtype)
    fla = model.type == "qwen3_next" and find_spec("fla") is not None and not machine.is_stand_in(device)
    exact = [nn.Module.to(copy.deepcopy(whole), dtype=one) for one in (torch.float64, torch.float32)[fla:]]
    steps = {
        kind: _training({name: one.to(device) if isinstance(one, Tensor) else one for name, one in batch.items()})
        for kind, batch in batches.items()
        if kind in STEPS
    }
    found = _judged(whole, exact, steps, Way())
    if model.type == "llama":
        for name, way in OPTIONS.items():
            found |= _judged(whole, exact, {name: steps["left-padded"]}, way)
    return found


def _judged(
    model: PreTrainedModel, exact: list[PreTrainedModel], steps: dict[str, Step], way: Way
) -> dict[str, tuple[float, str]]:
    """What comes of the steps of a copy of the model that trains this way, against the first that gives numbers.

    Some models mask with the lowest number of a dtype, of which NaN comes with padding in float64.
    """
    shared, found = copy.deepcopy(model), {}
    try:
        handle = sp_attention.enable(shared, "auto", longest=LONGEST, **way.asked)
    except (sp_attention.UnsupportedError, ValueError) as error:
        return {name: (0.0, f"{REFUSED}: {told(error)}") for name in steps}
    with handle:
        found["kernel"] = (0.0, handle.backend.kernel)
        if way.checkpoints:
            checkpoint_activations(shared)
        for name, step in steps.items():
            expected = next(filter(_is_finite, map(step, exact)), None)
            if expected is None:
                found[name] = (0.0, f"{NOT_RUN}: one process has numbers that are not finite")
                continue
            own, error = (largest_error(step(one), expected)[0] for one in (model, shared))
            is_right = error <= max(2 * own, TOLERANCES[torch.float64])
            found[name] = (error, f"{RIGHT if is_right else WRONG}: {error:.1e}, of one process {own:.1e}")
    return found


def _is_finite(values: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values.values())


def _training(inputs: dict[str, Any]) -> Step:
    """Yields the loss and every gradient."""

    def step(model: PreTrainedModel) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        sp_attention.average_gradients(model)
        gradients = {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
        return {"loss": loss.detach(), **gradients}

    return step
