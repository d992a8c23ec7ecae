"""Plots: the demo's loss curves and memory, and ratios of the benchmarks."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sp_attention.cli.benchmarks.ratios import Ratio
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


def draw_ratios(file: Path, title: str, axis: str, groups: "Mapping[str, Mapping[str, Ratio]]") -> None:
    """Write a PNG of bars in groups, with quartiles, and a line where nothing is lost."""
    middles = {group: {name: one.middle for name, one in bars.items()} for group, bars in groups.items()}
    spread = {group: {name: (one.low, one.high) for name, one in bars.items()} for group, bars in groups.items()}
    draw_bars(file, title, axis, middles, spread, line=1.0)


def draw_bars(
    file: Path,
    title: str,
    axis: str,
    groups: Mapping[str, Mapping[str, float]],
    spread: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    line: float | None = None,
) -> None:
    """Write a PNG of bars in groups, one for each contender; `spread` has the ends of the lines through them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axes = pyplot.subplots(figsize=(min(4 + 0.25 * len(groups) * len(names), 16), 5), layout="constrained")
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        here = [(place, group, bars[name]) for place, (group, bars) in enumerate(groups.items()) if name in bars]
        places = [place + (number - (len(names) - 1) / 2) * width for place, _, _ in here]
        axes.bar(places, [height for _, _, height in here], width, label=name)
        for place, (_, group, _) in zip(places, here, strict=True):
            if spread is not None:
                axes.plot([place, place], spread[group][name], color="black", linewidth=0.8)
    if line is not None:
        axes.axhline(line, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
    axes.set(title=title, ylabel=axis)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_lines(file: Path, title: str, x: str, y: str, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    """Write a PNG of lines through points, over an axis on which each step is as far as it is many times more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    places = sorted({place for points in lines.values() for place, _ in points})
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_stacks(file: Path, title: str, by_length: Mapping[int, Mapping[str, int]], limit: int) -> None:
    """Write a PNG of what memory is for, in GB, one part on the other, by tokens of a sequence; and of the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lengths = sorted(by_length)
    names = [name for name in by_length[lengths[0]] if any(by_length[length][name] for length in lengths)]
    heights = [[by_length[length][name] / 1e9 for length in lengths] for name in names]
    axes.stackplot(lengths, heights, labels=names)
    axes.axhline(limit / 1e9, color="black", linestyle="--", label="memory of a device")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set(title=title, xlabel="tokens of a sequence", ylabel="GB of a device at the peak")
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
