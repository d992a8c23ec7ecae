"""`sp-attention demo`: one model trained on real text in one process and on several ranks, side by side."""

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sp_attention.cli.reporting import Report, run_reporting
from sp_attention.cli.terminal import show_table

if TYPE_CHECKING:
    from rich.console import Console

    from sp_attention.cli.training import Trained, Training

# The largest relative difference of a loss that still counts as the same training in float32.
TOLERANCE = 1e-4
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Comparison:
    """Two trainings of the same model on the same text, and how far apart they are, relatively."""

    alone: "Trained"
    ranks: "list[Trained]"
    loss_difference: float
    gradient_difference: float

    @property
    def is_same(self) -> bool:
        return self.loss_difference <= TOLERANCE


@click.command()
@click.option("--ranks", type=click.IntRange(2), help="Processes that share each sequence (2, or torchrun's).")
@click.option("--steps", type=click.IntRange(1), default=16, show_default=True, help="Steps of training.")
@click.option("--seq", type=click.IntRange(2), default=2048, show_default=True, help="Tokens in a sequence.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True, help="Layers of the model made here.")
@click.option("--backend", default="sdpa", show_default=True, help="Kernel; see `sp-attention backends`.")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a pretrained causal language model with its tokenizer, instead of a small Llama made here.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to train on, instead of Python's own documentation.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("sp-attention-demo"),
    show_default=True,
    help="Folder for the plot and the numbers.",
)
def demo(
    ranks: int | None, steps: int, seq: int, layers: int, backend: str, model: Path | None, text: Path | None, out: Path
) -> int:
    """Train a small Llama on English text in one process and on several, and compare.

    Both start from the same weights and see the same text. The several ranks share every sequence by
    sp_attention.enable(model, backend). Exit status 1 when a loss differs by more than 1e-4 relative.
    """
    from rich.console import Console

    from sp_attention.cli.training import Training

    launched = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    if launched is not None and ranks not in (None, launched):
        raise click.UsageError(f"--ranks {ranks} does not fit torchrun's {launched} processes; leave it out")
    size = launched or ranks or 2
    if size < 2:
        raise click.UsageError("one process cannot share a sequence; start at least two")
    _require_backend(backend)
    with tempfile.TemporaryDirectory(prefix="sp_attention_demo_") as folder:
        training = Training(Path(folder, "tokens.pt"), steps, seq, layers, backend, model)
        console = Console(quiet=launched is not None and os.environ["RANK"] != "0")
        compare = _compare_here if launched is None else _compare_under_torchrun
        comparison = compare(training, size, text, console)
    if comparison is None:
        return 0
    _show(training, comparison)
    _write(out, training, comparison, text)
    console.print(f"plot and numbers in {out}/")
    if not comparison.is_same:
        print(
            f"sp-attention: the losses differ by {comparison.loss_difference:.1e} relative, more than {TOLERANCE:.0e}",
            file=sys.stderr,
        )
    return 0 if comparison.is_same else 1


def _require_backend(backend: str) -> None:
    from sp_attention.errors import BackendError
    from sp_attention.kernels.registry import candidates

    try:
        candidates("cpu", backend)
    except BackendError as error:
        raise click.UsageError(str(error)) from error


def _compare_here(training: "Training", size: int, text: Path | None, console: "Console") -> Comparison:
    """Start one process and then `size` ranks, with a progress bar for each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from sp_attention.cli.text import write_tokens

    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        reading = progress.add_task("text and tokenizer", total=1)
        alone = progress.add_task("one process", total=training.steps, start=False)
        together = progress.add_task(f"{size} ranks", total=training.steps, start=False)
        write_tokens(training, text)
        progress.advance(reading)

        def run(ranks: int, task: Any) -> "list[Trained]":
            progress.start_task(task)
            return _run(ranks, training, lambda step: progress.update(task, completed=step))

        return _compared(run(1, alone)[0], run(size, together))


def _run(ranks: int, training: "Training", report: Report) -> "list[Trained]":
    """Train on new processes; `report` is told of rank 0's steps while they run."""
    from sp_attention.cli.training import train

    return run_reporting(ranks, train, training, report=report, timeout=TIMEOUT)


def _compare_under_torchrun(
    training: "Training", size: int, text: Path | None, console: "Console"
) -> Comparison | None:
    """This process is one of the ranks that torchrun started; rank 0 runs the single process before, and compares."""
    import torch
    import torch.distributed as dist

    from sp_attention.cli.text import write_tokens
    from sp_attention.cli.training import train
    from sp_attention.distributed.process_groups import start_process_group

    start_process_group(torch.device("cpu"))
    alone = None
    shared: list[Training] = [training]
    if dist.get_rank() == 0:
        write_tokens(training, text)
        console.print("one process ...")
        alone = _run(1, training, lambda step: console.print(f"  step {step}"))[0]
        console.print(f"{size} ranks ...")
    dist.broadcast_object_list(shared)
    mine = train(shared[0], lambda step: console.print(f"  step {step}"))
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine)
    return None if alone is None else _compared(alone, everyone)


def _compared(alone: "Trained", ranks: "list[Trained]") -> Comparison:
    from sp_attention.testing import relative_error

    losses = [
        abs(ours - theirs) / abs(theirs)
        for rank in ranks
        for ours, theirs in zip(rank.losses, alone.losses, strict=True)
    ]
    gradients = [
        relative_error(ranks[0].gradients[name], theirs) for name, theirs in alone.gradients.items() if theirs.any()
    ]
    # A NaN must not count as small, which the order of max() decides: not <= is what is asked of it in the end.
    worst = next((loss for loss in losses if loss != loss), max(losses))
    return Comparison(alone, ranks, worst, max(gradients))


def _show(training: "Training", comparison: Comparison) -> None:
    alone, ranks = comparison.alone, comparison.ranks
    title = f"{alone.parameters / 1e6:.1f} M parameters, {training.seq} tokens a step, kernel {training.backend}"
    losses = [
        (str(step), f"{theirs:.6f}", f"{ours:.6f}", f"{abs(ours - theirs) / abs(theirs):.1e}")
        for step, (theirs, ours) in enumerate(zip(alone.losses, ranks[0].losses, strict=True), start=1)
    ]
    show_table(("step", "loss, one process", f"loss, {len(ranks)} ranks", "difference"), losses, title)
    peaks, own = [_mebibytes(rank.peak) for rank in ranks], [_mebibytes(rank.peak - rank.start) for rank in ranks]
    in_all = ranks[0].tokens_per_second
    rows = (
        ("peak resident memory", _mebibytes(alone.peak), ", ".join(peaks)),
        ("  of it for the training", _mebibytes(alone.peak - alone.start), ", ".join(own)),
        ("tokens/s", f"{alone.tokens_per_second:.0f}", f"{in_all / len(ranks):.0f} ({in_all:.0f} in all)"),
        ("largest difference of a loss", "", f"{comparison.loss_difference:.1e}"),
        ("largest difference of a gradient, step 1", "", f"{comparison.gradient_difference:.1e}"),
    )
    click.echo()
    show_table(("", "one process", f"each of {len(ranks)} ranks"), rows)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _write(out: Path, training: "Training", comparison: Comparison, text: Path | None) -> None:
    import torch
    import transformers

    import sp_attention
    from sp_attention.cli.figure import draw

    def numbers(trained: "Trained") -> dict[str, Any]:
        return {name: value for name, value in asdict(trained).items() if name != "gradients"}

    out.mkdir(parents=True, exist_ok=True)
    draw(out / "demo.png", comparison.alone, comparison.ranks)
    record = {
        "settings": {
            "ranks": len(comparison.ranks),
            "steps": training.steps,
            "seq": training.seq,
            "layers": training.layers,
            "backend": training.backend,
            "model": str(training.model) if training.model else None,
            "text": str(text) if text else "pydoc_data.topics",
        },
        "one_process": numbers(comparison.alone),
        "ranks": [numbers(rank) for rank in comparison.ranks],
        "loss_difference": comparison.loss_difference,
        "gradient_difference_step_1": comparison.gradient_difference,
        "same": comparison.is_same,
        "versions": {
            "sp_attention": sp_attention.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    (out / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
