"""Speed and memory on this machine, beside what else is installed: `python bench/speed.py` writes docs/speed.md.

Makes every run of `sp-attention bench` (or some: `--only exchange,scale`), leaves the raw numbers and a plot of each in
docs/data/speed, and writes the page from all that is there. `--only ""` measures nothing and writes the page anew.
"""

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import click

from sp_attention.cli.bench import bench
from sp_attention.cli.benchmarks.exchange import LIMIT, OURS
from sp_attention.cli.benchmarks.layer import KERNEL
from sp_attention.cli.benchmarks.ratios import ratio
from sp_attention.cli.benchmarks.record import Record, Table, markdown
from sp_attention.cli.benchmarks.training import ALONE, DEEPSPEED

ROOT = Path(__file__).parent.parent
DATA, PAGE = ROOT / "docs" / "data" / "speed", ROOT / "docs" / "speed.md"
# The runs that the page's numbers are from: the arguments of `sp-attention bench`, by the folder of what comes out.
RUNS = {
    "exchange": "exchange",
    "layer": "layer",
    "model": "model --rounds 3",
    "memory": "memory --length 4096 --length 8192 --ranks 2 --ranks 4",
    "limit": "memory --limit 4 --no-attention --length 131072 --length 163840",
    "alone": (
        "memory --model 1M --limit 1 --no-attention --ranks 1 --length 4096 --length 6144 --length 18432 --length 32768"
    ),
    "long": (
        "memory --model 1M --ranks 2 --ranks 4 --length 4096 --length 8192 --length 16384 --length 32768 --length 65536"
    ),
    "predicted": "memory --predicted --ranks 2 --ranks 4 --length 4096 --length 8192 --length 16384",
    "scale": "scale",
}
# Of each run, a title and what it is about.
TEXTS = {
    "exchange": (
        "Exchange",
        """
The exchange with an attention that does nothing, forward and backward, over four `all_to_all_single` of the bytes that
have to move, on buffers that are there already. Everyone's results and gradients are checked first, bit for bit. Of
veomni, ms-swift and verl, which import much that an exchange has no need of, the module that has it is loaded alone.

Where ours spends what is above 1, by counters around its calls on 26 November 2026 (P 2, float32, S 8192, 16 key
heads): of 80 ms, 40 are in the four all-to-all calls, which take 49 alone, since a rank's own tokens are left out of
them; 40 are copies of 152 MiB by rank, packed, unpacked, or a rank's own, which memory serves at 4 GB/s to each of
two cores. There was one page fault in a step; with buffers made anew there were 29,000, and the mean of all cases was
2.4 to 2.8 where it was 1.8. Copying a rank's own tokens while the others travel changed nothing beyond the spread: two
ranks keep two cores busy. Nor did huge pages help, nor a collective for the gradient of each tensor, so that none is
packed (1.6 in place of 1.5, side by side), nor to pack, send and unpack 0.1 to 4 MiB at a time, so that they stay in
the cache (19 ms and more in place of 17 for 24 MiB).
""",
    ),
    "layer": (
        "Layer",
        """
One layer's attention, causal, in float32, over those all-to-all calls and torch's `scaled_dot_product_attention` of one
rank's heads, each timed by itself. The others' exchanges are around the same kernel; outputs and gradients of all are
compared with those of one process first.

Where ours spends what is above 1, side by side on 26 November 2026 (P 2, 16 key heads, all-to-all and kernel 214 ms):
the exchange around nothing took 4 ms more than the all-to-all calls alone, the kernel on the strided tensors that
arrive as long as on contiguous ones; the other 5 to 9 ms are waits, since each of the four calls waits for the slower
kernel.
""",
    ),
    "model": (
        "Model",
        """
Whole training steps: forward, loss, backward, the mean of gradients, SGD. DeepSpeed's is `UlyssesSPAttentionHF` in the
loop of its tutorial. Both begin with the same loss.
""",
    ),
    "memory": (
        "Memory",
        """
Physical memory of a process at most, in two such steps, in new processes. Of it for training: above what stood before
there was a model.
""",
    ),
    "long": (
        "Long sequences",
        """
The same of a small model, whose attention over 65,536 tokens ends in minutes.
""",
    ),
    "limit": (
        "The longest sequence",
        """
Which of some lengths trains within 4 GiB a rank, two such steps with checkpointing. Ours has `mlp_tile=1024`, and the
loss in tiles as it comes; DeepSpeed ALST has `TiledMLP`, and `TiledFusedLogitsLoss` with 1,024 tokens a tile. A rank
that needs more ends at once, and longer sequences are not tried then. **The attention is a stand-in**: it takes the
memory that torch's takes and computes nothing, in both, since steps of such length would take hours.

With torch's attention, and before norms were in pieces too, ours trained 30,720 tokens (3,367 MiB), and ALST 20,480
(3,122 MiB) and not 30,720. But that was not its longest: the C library keeps freed pieces of up to 32 MiB for itself,
so that peaks fall again where tensors are larger, at 32,768 tokens here.

Where ours is at its peak, counted in tensors of 512 numbers for each token of a rank, with torch's allocations listed
on 26 November 2026: in the backward of the last layer's MLP, of about 19 the inputs of checkpointed layers are 8;
queries, keys and values as they arrived are 2, attention's output before and after the way back 2, the outputs of two
norms 2, what is added to the MLP 1, gradients 2, tables of positions half a one, and memory that lies ready 1 to 2.
Tried with gain: norms in pieces (2), pieces written into one tensor (4 and more, of the C library's), the gradients of
pieces put together once (1), no more than 256 MiB that lie ready (2 to 3). To train 1.5 times what ALST does, the 19
would have to be 16.
""",
    ),
    "alone": (
        "One process",
        """
The same search by one process alone, and within 1 GiB: ours with `mlp_tile=1024`, the loss in tiles and checkpointing,
over transformers alone with checkpointing. Neither shares anything. What makes the difference is logits, of which
transformers has all at once. The attention is the same stand-in.
""",
    ),
    "predicted": (
        "What a plan tells of memory",
        """
What [`sp-attention plan`](plan.md) tells of a step's peak over what is resident at most, of narrow models of four
layers (Qwen3-Next: three delta nets and one attention), so that activations are most of it. **The attention is a
stand-in**, as above. Measured above the weights, in the second forward of a length: the first tries the layers again.
The C library is told to give freed memory back at once, and no buffers of exchanges lie ready before a step.
""",
    ),
    "scale": (
        "Scale",
        """
One process, as rank 0 of a group that torch fakes. Python is the process' time in an enabled model less that in a plain
one of the same span, with an attention that does nothing in both.

It is flat while there are no more ranks than heads, 451 to 574 µs in the second table. Beyond, most of it is torch's
two collectives, which are given a size for each rank: 1.8 ms of a layer's forward on 1,024 ranks, and 0.06 ms on 8, by
Python's profiler on 27 November 2026.
""",
    ),
}
HEAD = """
# Speed

Written by `python bench/speed.py`, from runs of `sp-attention bench` on one machine, in which all contenders take
turns: each once in every round, in an order that rotates, with the ranks in step. Shown are medians, and quartiles in
brackets. The time of a round is that of the rank that took longest. A rank is a process with one thread, and gloo
carries. Peaks of device memory on a GPU are in [results](results/NVIDIA-H200-2026-11-27.md).

```text
sp-attention bench exchange          # and layer, model, memory, scale
sp-attention bench exchange --quick --ranks 2
sp-attention bench memory --model 1M --length 65536 --json
sp-attention bench memory --limit 4 --length 16384 --length 20480
sp-attention bench scale --ranks 8 --ranks 1024 --out folder     # a plot, and the numbers as JSON
pip install yunchang deepspeed       # what is installed is measured too; also veomni, ms-swift and verl
```
"""

# From `python bench/linear_cross_entropy.py`, whose raw numbers are beside those of the runs.
LOSS = """
## Head and loss in one

torch's `F.linear_cross_entropy` in chunks of our tiles, over our own loss in tiles (E 512, 4,096 tokens, V 32,768 and
131,072, one thread, forward and backward): in float32 0.56 and 0.52 of the memory, and 0.65 and 0.58 of the time, so it
does heads without steps there, on CPUs. With chunks of its own choice it takes 1.2 and 3.4 times the time of ours.

In bfloat16 it takes 1.4 of the memory, 1.4 and 1.2 of the time, and returns the sum of losses in bfloat16, wrong by
5e-4, with chunks of its own choice by 1e-2, where ours is by 9e-6. In float64 it does not compute in float32, as
ForCausalLMLoss does. It does not follow autocast, refuses DTensors, and is no call of a module, which engines follow.
So our own stays for all of these, and for heads with steps. Raw:
[data/speed/linear_cross_entropy.json](data/speed/linear_cross_entropy.json).
"""

# From `python bench/head_groups.py`.
GROUPS = """
## Head groups

What one causal attention takes of a rank, forward and backward, 2 ranks, 4,096 tokens, 16 heads and 8 key heads of 64
numbers in float32, one round on a busy machine (so its times tell nothing): all heads at once 81 MiB, in 2 groups 88,
in 4 groups 68, in 8 groups 61; in 4 groups with the next on its way 74. 48 MiB of each are this rank's own q, k, v,
output and their gradients, so what is above falls from 33 to 20 and 13. Two groups save nothing here: gradients are put
together in tensors of all heads, and q, k and v are kept. Raw: [data/head_groups.json](data/head_groups.json).
"""


def page(records: dict[str, Record]) -> str:
    """docs/speed.md, of the runs that there are numbers of."""
    parts = [HEAD.strip(), markdown(summary(records))]
    for run, (title, text) in TEXTS.items():
        parts += [f"## {title}", text.strip()]
        if run not in records:
            parts.append(f"Not measured yet: `python bench/speed.py --only {run}`.")
            continue
        record = records[run]
        module: Any = import_module(f"sp_attention.cli.benchmarks.{record['subject']}")
        parts += [markdown(table) for table in module.tables(record)]
        files = f"data/speed/{run}/{record['subject']}"
        parts += [f"![{title}]({files}.png)", f"{_surroundings(record)}; raw: [{files}.json]({files}.json)."]
    return "\n\n".join([*parts, LOSS.strip(), GROUPS.strip()]) + "\n"


Row = tuple[str, str, str]  # a figure, what was to be reached, and what was


def summary(records: dict[str, Record]) -> Table:
    """What was to be reached, and what was, as far as there are numbers of it."""
    rows = [row for run, rows_of in SUMMARIES.items() if run in records for row in rows_of(records[run])]
    return Table("In short", ("figure", "goal", "measured"), tuple(rows))


def _exchange(record: Record) -> Iterator[Row]:
    cases = [case["seconds"] for case in record["cases"]]
    means = {
        name: geometric_mean(ratio(case[name], case[LIMIT]).middle for case in cases)
        for name in cases[0]
        if name != LIMIT
    }
    ours = means.pop(OURS)
    others = f"; the others {min(means.values()):.2f} to {max(means.values()):.2f}" if means else ""
    yield f"exchange ÷ raw all-to-all, mean of {len(cases)} cases", "1.3 at most", f"{ours:.2f}{others}"


def _layer(record: Record) -> Iterator[Row]:
    for ranks, goal in ((2, "1.0"), (4, "1.05")):
        cases = [one["seconds"] for one in record["cases"] if one["case"]["ranks"] == ranks]
        mean = geometric_mean(median(one[OURS]) / (median(one[LIMIT]) + median(one[KERNEL])) for one in cases)
        yield f"layer ÷ (raw all-to-all + raw kernel), {ranks} ranks", f"{goal} at most", f"{mean:.2f}"


def _model(record: Record) -> Iterator[Row]:
    for one in record["cases"]:
        if DEEPSPEED in one["seconds"]:
            faster = ratio(one["seconds"][DEEPSPEED], one["seconds"][OURS]).middle
            goal = "1.2 at least" if one["ranks"] == 2 else ""
            yield f"tokens/s of training ÷ DeepSpeed's, {one['ranks']} ranks", goal, f"{faster:.2f}"


def _memory(record: Record) -> Iterator[Row]:
    peaks = {
        (one["name"], one["ranks"]): max(each["peak"] for each in one["each"])
        for one in record["peaks"]
        if one["length"] == 8192
    }
    for (name, ranks), peak in peaks.items():
        goal = "0.5 at most" if (name, ranks) == (OURS, 2) else ""
        if name != ALONE:
            what = f"peak of a rank ÷ one process, S 8192, {name} on {ranks} ranks"
            yield what, goal, f"{peak / peaks[ALONE, 1]:.2f}"


def _limit(record: Record) -> Iterator[Row]:
    if len(record["longest"]) > 1:
        ours, others = (_between(one) for one in record["longest"])
        what = "longest sequence within 4 GiB ÷ DeepSpeed ALST's, with a stand-in for attention"
        yield what, "1.5 at least", f"({ours}) ÷ ({others})"


def _alone(record: Record) -> Iterator[Row]:
    ours, alone = (_between(one) for one in record["longest"])
    what = f"longest sequence of one process within {record['limit']:g} GiB ÷ transformers alone, both checkpointed"
    yield what, "3 at least", f"({ours}) ÷ ({alone})"


def _scale(record: Record) -> Iterator[Row]:
    layers: dict[str, list[float]] = {}
    for one in record["cases"]:
        layers.setdefault(f"{one['heads']['query']} heads, {one['heads']['kv']} key heads", []).append(one["layer"])
    for heads, each in layers.items():
        what = f"hooks of a layer's forward, 8 to 1,024 ranks, {heads}"
        yield what, "flat", f"{min(each):.0f} to {max(each):.0f} µs"


# By run, what it says of the goals.
SUMMARIES: dict[str, Callable[[Record], Iterator[Row]]] = {
    "exchange": _exchange,
    "layer": _layer,
    "model": _model,
    "memory": _memory,
    "limit": _limit,
    "alone": _alone,
    "scale": _scale,
}


def _between(one: Record) -> str:
    """Where the longest sequence is: at least what trained, and less than what did not."""
    too_long = [trial["length"] for trial in one["trials"] if trial["peak"] is None]
    return f"{one['length']} {f'to {min(too_long)}' if too_long else 'or more'}"


def measured() -> dict[str, Record]:
    """The raw numbers that there are, by run."""
    return {run: json.loads(file.read_text()) for run in RUNS for file in (DATA / run).glob("*.json")}


def _surroundings(record: Record) -> str:
    around = record["surroundings"]
    versions = ", ".join(f"{name} {version}" for name, version in around["versions"].items())
    return f"{around['date']}, {around['cores']} cores, Python {around['python']}, {versions}"


@click.command()
@click.option("--only", default=",".join(RUNS), show_default=True, help="Runs to make, with commas.")
def main(only: str) -> None:
    """Measure, and write the page."""
    for run in filter(None, only.split(",")):
        arguments = [*RUNS[run].split(), "--out", str(DATA / run)]
        bench.main(arguments, prog_name="sp-attention bench", standalone_mode=False)
    PAGE.write_text(page(measured()))


if __name__ == "__main__":
    main()
