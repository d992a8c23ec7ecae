"""Memory and time of training hybrids, by one process and by ranks: `python bench/hybrids.py`.

Small models of four layers with random weights in float32, kernel sdpa, no checkpointing. Every round starts new
processes for each contender, in an order that rotates, each with one thread: one process runs transformers alone, and
ranks run the model with mixers on gathered tokens, as a layer's mixer is where nothing is known of its functions, and
by heads. So P ranks have P cores. A step is forward, loss, backward, the mean of gradients and SGD; the first of a
process is not timed. Writes what was measured as JSON, and a table of it in Markdown.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any
from unittest import mock

import click
import torch
import transformers

import sp_attention
from sp_attention.cli.benchmarks.record import Record, Table, markdown, surroundings
from sp_attention.cli.rss import resident_memory
from sp_attention.launch import run_ranks

RAW = Path(__file__).parent.parent / "docs" / "data" / "hybrids.json"
TIMEOUT = 1800.0
ALONE, GATHERED, SHARED = "one process", "gathered mixers", "mixers by heads"
COMMON = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 1024,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-Next": (
        "Qwen3NextForCausalLM",
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_key_heads": 4,
         "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 64, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    ),
    "Mamba2": (
        "Mamba2ForCausalLM",
        {"num_heads": 16, "head_dim": 32, "n_groups": 4, "state_size": 64, "chunk_size": 64},
    ),
    "LFM2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_ff_dim": 1024}),
    "Bamba": (
        "BambaForCausalLM",
        {"attn_layer_indices": [3], "mamba_n_heads": 16, "mamba_d_head": 32, "mamba_n_groups": 4, "mamba_d_state": 64,
         "mamba_chunk_size": 64},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """One process: bytes before there was a model, and at most; seconds of each step, by the clock and of a core."""

    start: int
    peak: int
    seconds: list[float]
    cpu_seconds: list[float]
    loss: float


def train(model_name: str, contender: str, length: int, steps: int) -> Trained:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start = resident_memory("VmRSS")
    cls, settings = MODELS[model_name]
    model_class = getattr(transformers, cls)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**COMMON | settings)).train()
    ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(0))
    known: AbstractContextManager[Any] = nullcontext()
    if contender == GATHERED:
        known = mock.patch("sp_attention.rehearsal.classify.usable", return_value={})
    with known:
        if contender != ALONE:
            sp_attention.enable(model, backend="sdpa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seconds, cpu_seconds, loss = [], [], 0.0
    for _ in range(1 + steps):
        clock, cpu = perf_counter(), process_time()
        value = model(input_ids=ids, labels=ids, use_cache=False).loss
        value.backward()
        if contender != ALONE:
            sp_attention.average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(value.detach())
        seconds.append(perf_counter() - clock)
        cpu_seconds.append(process_time() - cpu)
    return Trained(start, resident_memory("VmHWM"), seconds[1:], cpu_seconds[1:], loss)


def contenders(ranks: tuple[int, ...]) -> list[tuple[str, int]]:
    return [(ALONE, 1), *((name, number) for number in ranks for name in (GATHERED, SHARED))]


def measure(
    names: tuple[str, ...], lengths: tuple[int, ...], ranks: tuple[int, ...], rounds: int, steps: int
) -> Iterator[Record]:
    """What every process of every contender took, round by round."""
    for name in names:
        for length in lengths:
            for number in range(rounds):
                found = contenders(ranks)
                turn = number % len(found)
                for contender, many in found[turn:] + found[:turn]:
                    each = run_ranks(many, train, name, contender, length, steps, timeout=TIMEOUT)
                    click.echo(f"{name}, {length} tokens, round {number}: {contender}, {many}: {each[0]}", err=True)
                    yield {
                        "model": name, "length": length, "round": number, "contender": contender, "ranks": many,
                        "each": [asdict(one) for one in each],
                    }  # fmt: skip


def table(record: Record) -> Table:
    """The middle of all rounds: of the rank that took most, over one process, and over gathered mixers."""
    rows: dict[tuple[str, int, str, int], list[Record]] = {}
    for run in record["runs"]:
        rows.setdefault((run["model"], run["length"], run["contender"], run["ranks"]), []).append(run)
    middle = {key: _middle(runs) for key, runs in rows.items()}
    cells = []
    for (name, length, contender, ranks), (peak, seconds, cpu) in middle.items():
        peak_alone, seconds_alone, _ = middle[name, length, ALONE, 1]
        before = middle.get((name, length, GATHERED, ranks))
        cells.append(
            (
                name, f"{length}", contender, f"{ranks}", f"{peak / 2**20:.0f} MiB", f"{peak / peak_alone:.2f}",
                f"{seconds:.2f} s", f"{seconds / seconds_alone:.2f}", f"{cpu:.2f} s",
                f"{cpu / before[2]:.2f}" if before else "",
            )
        )  # fmt: skip
    columns = (
        "model", "S", "", "ranks", "memory for training", "÷ one process", "step", "÷ one process", "of a core",
        "÷ gathered",
    )  # fmt: skip
    return Table(
        "Memory of a rank above what stood before there was a model, and time of a step", columns, tuple(cells)
    )


def _middle(runs: list[Record]) -> tuple[float, float, float]:
    peaks = [max(one["peak"] - one["start"] for one in run["each"]) for run in runs]
    seconds = [max(step) for run in runs for step in zip(*(one["seconds"] for one in run["each"]), strict=True)]
    cpu = [max(step) for run in runs for step in zip(*(one["cpu_seconds"] for one in run["each"]), strict=True)]
    return median(peaks), median(seconds), median(cpu)


@click.command()
@click.option("--model", "names", multiple=True, type=click.Choice([*MODELS]), help="Some of them only.")
@click.option("--length", "lengths", multiple=True, type=int, default=(4096, 8192), show_default=True)
@click.option("--ranks", multiple=True, type=int, default=(2,), show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--steps", default=2, show_default=True, help="Timed steps of a process.")
@click.option("--out", type=click.Path(path_type=Path), default=RAW, show_default=True)
def main(
    names: tuple[str, ...], lengths: tuple[int, ...], ranks: tuple[int, ...], rounds: int, steps: int, out: Path
) -> None:
    """Measure, write the raw numbers, and show the table."""
    record: Record = {"surroundings": surroundings(), "models": MODELS, "common": COMMON}
    record["runs"] = []
    for run in measure(names or tuple(MODELS), lengths, ranks, rounds, steps):
        record["runs"].append(run)
        out.write_text(json.dumps(record, indent=1))
    click.echo(markdown(table(record)))


if __name__ == "__main__":
    main()
