"""`sp-attention bench`: what sequence parallelism costs here, over raw limits and beside what else is installed."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


@click.group()
def bench() -> None:
    """Measure exchange, layer, model, memory and scale, beside what is installed, in one run on this machine.

    Times are medians of rounds in which each contender has its turn, in an order that rotates, with quartiles.
    """


def _rounds(default: int) -> Callable[[Command], Command]:
    return click.option(
        "--rounds", type=click.IntRange(1), default=default, show_default=True, help="Of every contender."
    )


def _ranks(*default: int, at_least: int = 2) -> Callable[[Command], Command]:
    sizes = click.IntRange(at_least)
    return click.option("--ranks", type=sizes, multiple=True, default=default, show_default=True, help="Repeatable.")


def _answers(command: Command) -> Command:
    """The options of what comes out."""
    command = click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")(command)
    out = click.Path(file_okay=False, path_type=Path)
    return click.option("--out", type=out, help="Folder for a plot and the numbers as JSON.")(command)


def _run(subject: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Let `sp_attention.cli.benchmarks.SUBJECT` measure with a bar of progress, and show what it found."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from sp_attention.cli.benchmarks.record import show, surroundings

    module: Any = importlib.import_module(f"sp_attention.cli.benchmarks.{subject}")
    bars = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*bars, console=Console(stderr=True)) as progress:
        task = progress.add_task(subject, total=1.0)
        measured = module.benchmark(**options, report=lambda share: progress.update(task, completed=share))
    record = {"subject": subject, "surroundings": surroundings(), **measured}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{subject}.json").write_text(json.dumps(record, indent=1) + "\n")
        module.draw(record, out / f"{subject}.png")
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    for table in module.tables(record):
        show(table)
    if out is not None:
        click.echo(f"plot and numbers in {out}/")


@bench.command()
@_ranks(2, 4)
@_rounds(15)
@click.option("--quick", is_flag=True, help="The smallest case only.")
@_answers
def exchange(ranks: tuple[int, ...], rounds: int, quick: bool, out: Path | None, as_json: bool) -> None:
    """The exchange around attention that does nothing, over the all-to-all calls it cannot do without.

    16 query heads of 64 and 4 or 16 key heads, 2,048 or 8,192 tokens, bfloat16 and float32, forward and backward.
    Beside it the exchanges of veomni, ms-swift, yunchang, deepspeed and verl, as far as they are installed.
    """
    _need_to_divide_heads(ranks)
    _run("exchange", out, as_json, ranks=ranks, rounds=rounds, quick=quick)


@bench.command()
@_ranks(2, 4)
@_rounds(15)
@click.option("--quick", is_flag=True, help="The first case only.")
@_answers
def layer(ranks: tuple[int, ...], rounds: int, quick: bool, out: Path | None, as_json: bool) -> None:
    """One layer's attention, over the all-to-all calls and the kernel that it cannot do without.

    torch's scaled_dot_product_attention, causal, in float32, 2,048 tokens, 16 query heads of 64 and 4 or 16 key heads,
    forward and backward. Beside it the same kernel in the exchanges of the others that are installed.
    """
    _need_to_divide_heads(ranks)
    _run("layer", out, as_json, ranks=ranks, rounds=rounds, quick=quick)


@bench.command()
@_ranks(2)
@click.option("--length", type=click.IntRange(16), default=8192, show_default=True, help="Tokens of the sequence.")
@_rounds(5)
@_answers
def model(ranks: tuple[int, ...], length: int, rounds: int, out: Path | None, as_json: bool) -> None:
    """Training steps of a Llama of 49 M parameters, in tokens a second.

    8 layers, a width of 512, 8 heads and 4 key heads, in float32. Beside it DeepSpeed's UlyssesSPAttentionHF.
    """
    _need_to_divide_heads(ranks)
    _need_to_divide(length, ranks)
    _run("model", out, as_json, ranks=ranks, length=length, rounds=rounds)


@bench.command()
@_ranks(2, at_least=1)
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(16),
    multiple=True,
    default=(8192,),
    show_default=True,
    help="Repeatable.",
)
@click.option(
    "--model",
    "size",
    type=click.Choice(["49M", "1M"]),
    default="49M",
    show_default=True,
    help="The Llama with so many parameters; the small one for long sequences.",
)
@click.option("--limit", type=click.FloatRange(0, min_open=True), help="Find the longest that trains in so many GiB.")
@click.option(
    "--no-attention", is_flag=True, help="Attention takes its memory and computes nothing: in minutes, not in hours."
)
@click.option("--predicted", is_flag=True, help="What `sp-attention plan` tells, over what is measured.")
@_answers
def memory(
    ranks: tuple[int, ...],
    lengths: tuple[int, ...],
    size: str,
    limit: float | None,
    no_attention: bool,
    predicted: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Peak resident memory of training steps of such a model, of a rank and of one process.

    Beside it DeepSpeed's UlyssesSPAttentionHF. With --limit, instead, the longest of these lengths that trains on the
    first number of ranks, with checkpointing, beside DeepSpeed's with checkpointing and with MLP and loss in tiles; on
    one rank beside transformers alone with checkpointing.
    With --predicted, instead, steps of a small Llama, mixture of experts and hybrid, on one process and on ranks, with
    an attention that computes nothing, and what `sp-attention plan` tells of their memory.
    """
    _need_to_divide_heads(ranks)
    if predicted:
        if limit is not None:
            raise click.UsageError("--predicted and --limit are two different measurements: give one")
        _run("predicted", out, as_json, ranks=tuple(sorted({1, *ranks})), lengths=lengths)
        return
    for length in lengths:
        _need_to_divide(length, ranks)
    _run("memory", out, as_json, ranks=ranks, lengths=lengths, size=size, limit=limit, no_attention=no_attention)


@bench.command()
@_ranks(8, 16, 32, 64, 128, 256, 512, 1024)
@_rounds(15)
@_answers
def scale(ranks: tuple[int, ...], rounds: int, out: Path | None, as_json: bool) -> None:
    """What a layer costs one of very many ranks: bytes, collectives, and the time of Python.

    One process is one of the ranks of a group that torch fakes. A small model with 1,024 heads, and one with 128 heads
    and 8 key heads, run with an attention that does nothing, enabled and plain.
    """
    _run("scale", out, as_json, ranks=ranks, rounds=rounds)


def _need_to_divide(length: int, ranks: tuple[int, ...]) -> None:
    for size in ranks:
        if length % size:
            raise click.UsageError(f"--length {length}: others want the {size} ranks to have equal parts of it")


def _need_to_divide_heads(ranks: tuple[int, ...]) -> None:
    for size in ranks:
        if 4 % size:
            raise click.UsageError(f"--ranks {size}: the 4 key heads are shared evenly here, by 2 or by 4")
