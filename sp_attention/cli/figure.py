"""The plot of the demo: loss curves and memory."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sp_attention.cli.training import Trained


def draw(file: Path, alone: "Trained", ranks: "list[Trained]") -> None:
    """Write a PNG of the losses of both trainings, one on the other, and of the peak memory of every process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = range(1, len(alone.losses) + 1)
    losses.plot(steps, alone.losses, color="tab:gray", linewidth=5, alpha=0.5, label="one process")
    losses.plot(steps, ranks[0].losses, color="tab:blue", marker=".", label=f"{len(ranks)} ranks")
    losses.set(title="training loss", xlabel="step", ylabel="loss")
    losses.legend()
    processes = [alone, *ranks]
    names = ["one process", *(f"rank {rank}" for rank in range(len(ranks)))]
    colors = ["tab:gray", *["tab:blue"] * len(ranks)]
    before = [process.start / 2**20 for process in processes]
    own = [(process.peak - process.start) / 2**20 for process in processes]
    memory.bar(names, before, color="lightgray", label="Python and its libraries")
    bars = memory.bar(names, own, bottom=before, color=colors, label="for the training")
    memory.bar_label(bars, labels=[f"{size:.0f}" for size in own], label_type="center")
    memory.set(title="peak resident memory", ylabel="MiB")
    memory.legend(loc="lower right")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
