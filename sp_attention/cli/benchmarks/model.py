"""Training steps of a whole model, in tokens a second: this library's and DeepSpeed's on the same ranks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch.distributed as dist
import transformers

from sp_attention.cli.benchmarks.others import context_parallel, quieten, reasons
from sp_attention.cli.benchmarks.ratios import ratio
from sp_attention.cli.benchmarks.record import Record, Table
from sp_attention.cli.benchmarks.rounds import Seconds, interleaved
from sp_attention.cli.benchmarks.training import DEEPSPEED, MODEL, OURS, make_step
from sp_attention.cli.figure import draw_bars
from sp_attention.cli.reporting import Report, run_reporting

# In float32, whose sums come in another order; of the losses of a first step.
TOLERANCE, TIMEOUT = 1e-4, 12 * 3600.0


def benchmark(ranks: Sequence[int], length: int, rounds: int, report: Callable[[float], None]) -> Record:
    """Measure on new processes; `report` is told what share is done."""
    record: Record = {"model": MODEL, "length": length, "rounds": rounds, "cases": []}
    for number, size in enumerate(ranks):

        def tell(done: int, before: int = number) -> None:
            report((before + done / rounds) / len(ranks))

        seconds, absent = run_reporting(size, measure, length, rounds, report=tell, timeout=TIMEOUT)[0]
        record["cases"].append({"ranks": size, "seconds": seconds})
        record["absent"] = absent
    return record


def measure(length: int, rounds: int, report: Report) -> tuple[Seconds, dict[str, str]]:
    """On every rank of the default process group: seconds of a step, and why there are none of others."""
    quieten()
    transformers.logging.set_verbosity_error()
    why_not = {DEEPSPEED: reasons()[DEEPSPEED], "torch context parallel": context_parallel()}
    names = [OURS] if why_not[DEEPSPEED] is not None else [OURS, DEEPSPEED]
    # Ours first: DeepSpeed's replaces a function that transformers has for all models.
    steps = {name: make_step(name, length) for name in names}
    losses = {name: step() for name, step in steps.items()}
    for name, loss in losses.items():
        if not abs(loss - losses[OURS]) <= TOLERANCE * abs(losses[OURS]):
            raise AssertionError(f"{name}: the loss of the first step is {loss}, and of {OURS} {losses[OURS]}")
    dist.barrier()
    absent = {name: reason for name, reason in why_not.items() if reason is not None}
    return interleaved(steps, rounds, 1, report), absent


def tables(record: Record) -> list[Table]:
    """Tokens a second of all ranks together, and ours over the other's."""
    names = list(record["cases"][0]["seconds"])
    rows = []
    for one in record["cases"]:
        seconds = one["seconds"]
        speeds = [f"{record['length'] / median(seconds[name]):.0f}" for name in names]
        faster = [str(ratio(seconds[name], seconds[OURS])) for name in names if name != OURS]
        rows.append((str(one["ranks"]), *speeds, *faster))
    columns = ("ranks", *(f"{name}, tokens/s" for name in names), *(f"{OURS} ÷ {n}" for n in names if n != OURS))
    title = f"Training steps of a Llama of 49 M parameters, float32, S {record['length']}, {record['rounds']} rounds"
    absent = tuple(f"{name}: {reason}" for name, reason in record["absent"].items())
    return [Table(title, columns, tuple(rows), absent)]


def draw(record: Record, file: Path) -> None:
    """A PNG of tokens a second."""
    groups = {
        f"{one['ranks']} ranks": {name: record["length"] / median(times) for name, times in one["seconds"].items()}
        for one in record["cases"]
    }
    draw_bars(file, f"training steps, S {record['length']}", "tokens/s", groups)
