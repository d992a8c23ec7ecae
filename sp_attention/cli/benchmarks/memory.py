"""Peak resident memory of training steps, and the longest sequence that trains within a limit.

Each is measured in new processes, since a process does not give back all that it once had.
"""

import os
import threading
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from sp_attention.cli.benchmarks.model import TIMEOUT
from sp_attention.cli.benchmarks.others import quieten
from sp_attention.cli.benchmarks.record import Record, Table
from sp_attention.cli.benchmarks.training import (
    ALONE,
    ALONE_LONG,
    ALST,
    DEEPSPEED,
    MODELS,
    OURS,
    OURS_LONG,
    make_step,
)
from sp_attention.cli.figure import draw_bars
from sp_attention.cli.machine import installed
from sp_attention.cli.rss import resident_memory
from sp_attention.launch import RanksError, run_ranks

# The exit status of a rank that needs more than it may, and how often it looks, in seconds.
TOO_MUCH, WATCH = 77, 0.05
GIB = 2**30


@dataclass(frozen=True)
class Peak:
    """Bytes of physical memory of one process: before there was a model, and at most."""

    start: int
    peak: int


def benchmark(
    ranks: Sequence[int],
    lengths: Sequence[int],
    size: str,
    limit: float | None,
    no_attention: bool,
    report: Callable[[float], None],
) -> Record:
    """Measure the peaks at all lengths, or the longest of them that trains within `limit` GiB a rank.

    size: which of MODELS. no_attention: attention takes its memory and computes nothing. The longest is looked for on
    the first number of ranks; on one, beside transformers alone with checkpointing.
    """
    others = installed("deepspeed") is not None
    record: Record = {"model": MODELS[size], "limit": limit, "no_attention": no_attention}
    record |= {"peaks": [], "longest": [], "absent": {}}
    is_alone = limit is not None and ranks[0] == 1
    names = [OURS_LONG, *([ALONE_LONG] if is_alone else [ALST] if others else [])]
    if not others and not is_alone:
        record["absent"] = {DEEPSPEED: "not installed: pip install deepspeed"}
    if limit is not None:
        for done, name in enumerate(names):
            contender = Contender(name, ranks[0], size, no_attention, int(limit * GIB))
            record["longest"].append(longest(contender, sorted(lengths)))
            report((done + 1) / len(names))
        return record
    runs = [
        (length, Contender(name, number, size, no_attention, None))
        for length in lengths
        for name, numbers in {ALONE: [1], OURS: ranks, **({DEEPSPEED: ranks} if others else {})}.items()
        for number in numbers
    ]
    for done, (length, one) in enumerate(runs):
        peaks = one.peaks(length)
        assert peaks is not None
        each = [asdict(peak) for peak in peaks]
        record["peaks"].append({"name": one.name, "ranks": one.ranks, "length": length, "each": each})
        report((done + 1) / len(runs))
    return record


@dataclass(frozen=True)
class Contender:
    """Who trains which model on so many ranks, each of which may take `limit` bytes, None for any number."""

    name: str
    ranks: int
    size: str
    no_attention: bool
    limit: int | None

    def peaks(self, length: int) -> list[Peak] | None:
        """Those of each rank in two steps; None if a rank needs more than it may take."""
        try:
            found: list[Peak] = run_ranks(self.ranks, _peak, self, length, timeout=TIMEOUT)
        except RanksError as error:
            if self.limit is not None and f"exited with code {TOO_MUCH}" in str(error):
                return None
            raise click.ClickException(str(error)) from error
        return found


def longest(contender: Contender, lengths: list[int]) -> Record:
    """The longest of these sequences, in order, that it trains, 0 if none; and what came of those that were tried."""
    trials: list[Record] = []

    def is_too_long(length: int) -> bool:
        peaks = contender.peaks(length)
        trials.append({"length": length, "peak": None if peaks is None else max(one.peak for one in peaks)})
        return peaks is None

    fits = bisect(lengths, False, key=is_too_long)
    length = lengths[fits - 1] if fits else 0
    return {"name": contender.name, "ranks": contender.ranks, "length": length, "trials": trials}


def tables(record: Record) -> list[Table]:
    """Peaks over those of one process, or the longest sequences."""
    absent = tuple(f"{name}: {reason}" for name, reason in record["absent"].items())
    size = next(size for size, sizes in MODELS.items() if sizes == record["model"])
    subject = f"a Llama of {size} parameters, float32"
    if record["no_attention"]:
        subject += ", with an attention that computes nothing"
    if record["limit"] is not None:
        title = f"The longest sequence tried that trains within {record['limit']:g} GiB a rank, {subject}"
        found = [
            (one["name"], str(one["ranks"]), str(one["length"]), _told(one["trials"])) for one in record["longest"]
        ]
        return [Table(title, ("", "ranks", "tokens", "peaks"), tuple(found), absent)]
    alone = {one["length"]: _most(one) for one in record["peaks"] if one["name"] == ALONE}
    rows = []
    for one in record["peaks"]:
        cells = [
            cell
            for most, base in zip(_most(one), alone[one["length"]], strict=True)
            for cell in (_mebibytes(most), f"{most / base:.2f}")
        ]
        rows.append((str(one["length"]), one["name"], str(one["ranks"]), *cells))
    columns = ("S", "", "ranks", "peak of a rank", "÷ one process", "of it for training", "÷ one process")
    return [Table(f"Peak resident memory of training, {subject}", columns, tuple(rows), absent)]


def _told(trials: list[Record]) -> str:
    """What came of each length that was tried."""
    ordered = sorted(trials, key=lambda trial: int(trial["length"]))
    return ", ".join(f"{one['length']}: {_mebibytes(one['peak']) if one['peak'] else 'more'}" for one in ordered)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def draw(record: Record, file: Path) -> None:
    """A PNG of the peaks, or of the longest sequences."""
    if record["limit"] is not None:
        tokens = {one["name"]: float(one["length"]) for one in record["longest"]}
        draw_bars(file, f"within {record['limit']:g} GiB a rank", "tokens", {"longest sequence": tokens})
        return
    groups: dict[str, dict[str, float]] = {}
    for one in record["peaks"]:
        name = one["name"] if one["name"] == ALONE else f"{one['name']}, {one['ranks']} ranks"
        groups.setdefault(f"S {one['length']}", {})[name] = _most(one)[0] / 2**20
    draw_bars(file, "peak resident memory of a rank", "MiB", groups)


def _most(one: Record) -> tuple[int, int]:
    """Of the rank that needs most: its peak, and what of it came after the start."""
    return max(each["peak"] for each in one["each"]), max(each["peak"] - each["start"] for each in one["each"])


def _peak(of: Contender, length: int) -> Peak:
    quieten()
    transformers.logging.set_verbosity_error()
    start = resident_memory("VmRSS")
    if of.limit is not None:
        threading.Thread(target=_watch, args=(of.limit,), daemon=True).start()
    step = make_step(of.name, length, MODELS[of.size])
    attention = attention_of_nothing if of.no_attention else F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        for _ in range(2):  # Gradients and what torch keeps are there from the second on.
            step()
    peak = resident_memory("VmHWM")
    if of.limit is not None and peak > of.limit:
        os._exit(TOO_MUCH)
    return Peak(start, peak)


def _watch(limit: int) -> None:
    while resident_memory("VmRSS") <= limit:
        time.sleep(WATCH)
    os._exit(TOO_MUCH)


def attention_of_nothing(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    """In place of torch's attention: it takes the memory of that, and computes nothing."""
    result: Tensor = _Nothing.apply(query, key, value)  # type: ignore[no-untyped-call]  # torch has no types for it
    return result


class _Nothing(torch.autograd.Function):
    """Keeps and returns what torch's attention does on a CPU, [B, H, S, D] each, all zeros."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        batch, heads, length, size = given[0].shape
        output = given[0].new_zeros(batch, length, heads, size).transpose(1, 2)
        ctx.save_for_backward(*given, output, given[0].new_zeros(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(one, memory_format=torch.contiguous_format) for one in ctx.saved_tensors[:3])
