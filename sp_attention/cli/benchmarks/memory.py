"""Peak resident memory of training steps, and the longest sequence that trains within a limit.

Each is measured in new processes, since a process does not give back all that it once had.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import transformers

from sp_attention.cli.benchmarks.model import TIMEOUT
from sp_attention.cli.benchmarks.others import quieten
from sp_attention.cli.benchmarks.record import Record, Table
from sp_attention.cli.benchmarks.training import ALONE, ALST, DEEPSPEED, MODELS, OURS, OURS_LONG, make_step
from sp_attention.cli.figure import draw_bars
from sp_attention.cli.machine import installed
from sp_attention.cli.memory import resident_memory
from sp_attention.launch import RanksError, run_ranks

# The exit status of a rank that needs more than it may, and how often it looks, in seconds.
TOO_MUCH, WATCH = 77, 0.05
# Where the search begins; its lengths are multiples of GRAIN, and it ends when the answer is known to a part in FINE.
START, GRAIN, FINE = 4096, 256, 16
GIB = 2**30


@dataclass(frozen=True)
class Peak:
    """Bytes of physical memory of one process: before there was a model, and at most."""

    start: int
    peak: int


def benchmark(
    ranks: Sequence[int], lengths: Sequence[int], size: str, limit: float | None, report: Callable[[float], None]
) -> Record:
    """Measure the peaks by length, and the longest sequence within `limit` GiB a rank on the first number of ranks.

    size: which of MODELS.
    """
    others = installed("deepspeed") is not None
    runs = [
        (name, number, length)
        for length in lengths
        for name, numbers in {ALONE: [1], OURS: ranks, **({DEEPSPEED: ranks} if others else {})}.items()
        for number in numbers
    ]
    record: Record = {"model": MODELS[size], "limit": limit, "peaks": [], "longest": [], "absent": {}}
    if not others:
        record["absent"] = {DEEPSPEED: "not installed: pip install deepspeed"}
    searches = [] if limit is None else [OURS_LONG, *([ALST] if others else [])]
    of = len(runs) + 8 * len(searches)
    for done, (name, number, length) in enumerate(runs):
        peaks = peaks_of(name, number, length, size, None)
        assert peaks is not None
        record["peaks"].append({"name": name, "ranks": number, "length": length, "each": [asdict(p) for p in peaks]})
        report((done + 1) / of)
    for done, name in enumerate(searches):
        assert limit is not None
        trials: list[Record] = []

        def tried(length: int, name: str = name, trials: list[Record] = trials) -> int | None:
            peaks = peaks_of(name, ranks[0], length, size, int(limit * GIB))
            trials.append({"length": length, "peak": None if peaks is None else max(one.peak for one in peaks)})
            found: int | None = trials[-1]["peak"]
            return found

        length = longest(tried, int(limit * GIB))
        record["longest"].append({"name": name, "ranks": ranks[0], "length": length, "trials": trials})
        report((len(runs) + 8 * (done + 1)) / of)
    return record


def longest(peak: Callable[[int], int | None], limit: int) -> int:
    """The longest length whose `peak` is no more than `limit`, where it is None; to a part in FINE; 0 if none is.

    Each try is where the last two that fitted say that the limit is, so a few tries do.
    """
    fitting: list[tuple[int, int]] = [(0, 0)]
    length, high = START, None
    while True:
        found = peak(length)
        if found is None:
            high = length
        else:
            fitting.append((length, found))
        low, most = fitting[-1]
        grain = max(GRAIN, low // FINE // GRAIN * GRAIN)
        if high is not None and high - low <= grain:
            return low
        if len(fitting) > 2:
            before, less = fitting[-2]
            length = low + int((limit - most) * (low - before) / max(most - less, 1)) // GRAIN * GRAIN
        else:
            length = 2 * low
        length = max(length, low + grain)
        if high is not None and length >= high:
            length = low + max((high - low) // 2 // GRAIN * GRAIN, GRAIN)


def peaks_of(name: str, ranks: int, length: int, size: str, limit: int | None) -> list[Peak] | None:
    """Those of each rank in two steps; None if a rank needs more than `limit` bytes."""
    try:
        found: list[Peak] = run_ranks(ranks, _peak, name, length, size, limit, timeout=TIMEOUT)
    except RanksError as error:
        if limit is not None and f"exited with code {TOO_MUCH}" in str(error):
            return None
        raise click.ClickException(str(error)) from error
    return found


def tables(record: Record) -> list[Table]:
    """Peaks over those of one process, and the longest sequences."""
    alone = {one["length"]: _most(one) for one in record["peaks"] if one["name"] == ALONE}
    rows = []
    for one in record["peaks"]:
        cells = [
            cell
            for size, base in zip(_most(one), alone[one["length"]], strict=True)
            for cell in (f"{size / 2**20:.0f} MiB", f"{size / base:.2f}")
        ]
        rows.append((str(one["length"]), one["name"], str(one["ranks"]), *cells))
    columns = ("S", "", "ranks", "peak of a rank", "÷ one process", "of it for training", "÷ one process")
    absent = tuple(f"{name}: {reason}" for name, reason in record["absent"].items())
    size = next(size for size, sizes in MODELS.items() if sizes == record["model"])
    title = f"Peak resident memory of training, a Llama of {size} parameters, float32"
    found = [Table(title, columns, tuple(rows), absent)]
    if record["longest"]:
        title = f"The longest sequence that trains within {record['limit']:g} GiB a rank"
        lengths = tuple((one["name"], str(one["ranks"]), str(one["length"])) for one in record["longest"])
        found.append(Table(title, ("", "ranks", "tokens"), lengths))
    return found


def draw(record: Record, file: Path) -> None:
    """A PNG of the peaks."""
    groups: dict[str, dict[str, float]] = {}
    for one in record["peaks"]:
        name = one["name"] if one["name"] == ALONE else f"{one['name']}, {one['ranks']} ranks"
        groups.setdefault(f"S {one['length']}", {})[name] = _most(one)[0] / 2**20
    draw_bars(file, "peak resident memory of a rank", "MiB", groups)


def _most(one: Record) -> tuple[int, int]:
    """Of the rank that needs most: its peak, and what of it came after the start."""
    return max(each["peak"] for each in one["each"]), max(each["peak"] - each["start"] for each in one["each"])


def _peak(name: str, length: int, size: str, limit: int | None) -> Peak:
    quieten()
    transformers.logging.set_verbosity_error()
    start = resident_memory("VmRSS")
    if limit is not None:
        threading.Thread(target=_watch, args=(limit,), daemon=True).start()
    step = make_step(name, length, MODELS[size])
    for _ in range(2):  # Gradients and what torch keeps are there from the second on.
        step()
    peak = resident_memory("VmHWM")
    if limit is not None and peak > limit:
        os._exit(TOO_MUCH)
    return Peak(start, peak)


def _watch(limit: int) -> None:
    while resident_memory("VmRSS") <= limit:
        time.sleep(WATCH)
    os._exit(TOO_MUCH)
