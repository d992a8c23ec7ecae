"""The peak that `sp-attention plan` tells of a training step over the one that is measured, on CPUs, in float32.

A rank makes each model once, and measures all steps of it one after the other, above what stands before each, weights
among it: with the C library told to give freed memory back to the system at once, what is resident at most is what
tensors take. A step before all others loads whatever is loaded once.
"""

import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import sp_attention
from sp_attention.api import handle_of
from sp_attention.cli.benchmarks.memory import attention_of_nothing
from sp_attention.cli.benchmarks.record import Record, Table
from sp_attention.cli.figure import draw_bars
from sp_attention.cli.planning.dry_run import Share, parts_of_step
from sp_attention.cli.planning.meta_model import meta_model
from sp_attention.cli.planning.peaks import Held, Moment, peak
from sp_attention.cli.reporting import Report, run_reporting
from sp_attention.cli.rss import forget_peak, resident_memory
from sp_attention.region.versions import checkpoint_activations, keep_activations

# Of mallopt: from which size on memory is taken from the system, and given back to it.
_MMAP_THRESHOLD, _BYTES = -3, 2**16
TIMEOUT = 7200.0
_COMMON = {
    "vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 96, "num_experts_per_tok": 2, "head_dim": 32}
# Narrow models, so that activations of long sequences are most of what they take.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {"intermediate_size": 352}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**_EXPERTS, "num_experts": 8}),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        {
            **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 96, "linear_num_key_heads": 4,
            "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model of MODELS, tokens, and whether layers are checkpointed."""

    model: str
    length: int
    checkpointing: bool

    def config(self, **more: Any) -> Any:
        name, settings = MODELS[self.model]
        return getattr(transformers, name)(**{**_COMMON, **settings, **more})


def benchmark(ranks: Sequence[int], lengths: Sequence[int], report: Callable[[float], None]) -> Record:
    """Measure every case on every number of ranks, and predict it."""
    cases = [Case(*one) for one in product(MODELS, lengths, (False, True))]
    record: Record = {"common": _COMMON, "models": MODELS, "cases": []}
    for place, number in enumerate(ranks):

        def done(count: int, place: int = place) -> None:
            report((place + count / len(cases)) / len(ranks))

        each = run_reporting(number, measure, cases, report=done, timeout=TIMEOUT)
        for case, taken in zip(cases, zip(*each, strict=True), strict=True):
            told = predicted(case, number)
            record["cases"].append(
                {
                    **asdict(case), "ranks": number, "measured": max(taken), "each": taken, "predicted": told.total,
                    "when": told.name, "parts": dict(told.parts),
                }
            )  # fmt: skip
    return record


def predicted(case: Case, ranks: int) -> Moment:
    """Without weights, which stand before the step, and without an optimizer."""
    meta = meta_model(case.config(), torch.float32)
    parts = parts_of_step(meta, Share(1, case.length, ranks))
    return peak(Held(0, 0, 0, None), meta.layers, parts, checkpointing=case.checkpointing, offload=False)


def measure(cases: list[Case], report: Report) -> list[int]:
    """On every rank: the bytes that each case takes at most, above what was there before its step."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _BYTES)
    taken = []
    with mock.patch.object(F, "scaled_dot_product_attention", attention_of_nothing):
        for _, of_model in groupby(cases, key=lambda case: case.model):
            some = [*of_model]
            model = _ready(some[0])
            # The first forward of a length tries the layers again, which a plan does not count.
            checkpoint_activations(model)
            _step(model, max(case.length for case in some))
            for case in some:
                (checkpoint_activations if case.checkpointing else keep_activations)(model)
                _as_new(model, libc)
                start = resident_memory("VmRSS")
                forget_peak()
                _step(model, case.length)
                taken.append(resident_memory("VmHWM") - start)
                report(len(taken))
    return taken


def _ready(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(case.config()).train()
    if dist.get_world_size() > 1:
        sp_attention.enable(model, backend="sdpa")
    return model


def _as_new(model: PreTrainedModel, libc: ctypes.CDLL) -> None:
    """Give back what the steps before have left."""
    handle = handle_of(model)
    if handle is not None and handle.peers is not None:
        handle.peers.pool.clear()
    gc.collect()
    libc.malloc_trim(0)


def _step(model: PreTrainedModel, length: int) -> None:
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    sp_attention.average_gradients(model)
    model.zero_grad()


def ratio(one: Record) -> float:
    """What was predicted over what was measured."""
    return float(one["predicted"]) / float(one["measured"])


def tables(record: Record) -> list[Table]:
    """A row for each case."""
    rows = tuple(
        (
            one["model"],
            f"{one['length']:,}",
            str(one["ranks"]),
            "yes" if one["checkpointing"] else "no",
            f"{one['measured'] / 2**20:.0f} MiB",
            f"{one['predicted'] / 2**20:.0f} MiB",
            f"{ratio(one):.2f}",
            one["when"],
        )
        for one in record["cases"]
    )
    columns = ("model", "S", "ranks", "checkpointing", "measured", "predicted", "÷ measured", "predicted in")
    return [Table("Peak of a training step of a rank, of which a plan tells so much, float32", columns, rows)]


def draw(record: Record, file: Path) -> None:
    """A PNG of predicted over measured."""
    groups: dict[str, dict[str, float]] = {}
    for one in record["cases"]:
        name = f"{one['ranks']} ranks{', checkpointing' if one['checkpointing'] else ''}"
        groups.setdefault(f"{one['model']}, S {one['length']}", {})[name] = ratio(one)
    draw_bars(file, "peak of a step", "predicted ÷ measured", groups, line=1.0)
