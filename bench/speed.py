"""Speed and memory on this machine, beside what else is installed: `python bench/speed.py` writes docs/speed.md.

Makes every run of `sp-attention bench` (or some: `--only exchange,scale`), leaves the raw numbers and a plot of each in
docs/data/speed, and writes the page from all that is there. `--only ""` measures nothing and writes the page anew.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from sp_attention.cli.bench import bench
from sp_attention.cli.benchmarks.record import Record, markdown

ROOT = Path(__file__).parent.parent
DATA, PAGE = ROOT / "docs" / "data" / "speed", ROOT / "docs" / "speed.md"
# The runs that the page's numbers are from: the arguments of `sp-attention bench`, by the folder of what comes out.
RUNS = {
    "exchange": "exchange",
    "layer": "layer",
    "model": "model --rounds 3",
    "memory": "memory --length 4096 --length 8192 --ranks 2 --ranks 4",
    "limit": "memory --limit 4 --length 16384 --length 20480 --length 30720",
    "long": (
        "memory --model 1M --ranks 2 --ranks 4 --length 4096 --length 8192 --length 16384 --length 32768 --length 65536"
    ),
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
2.4 to 2.8 where it is 1.8. Copying a rank's own tokens while the others travel changed nothing beyond the spread: two
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
there was a model. The longest sequence is with checkpointing; DeepSpeed ALST has `TiledMLP`, and `TiledFusedLogitsLoss`
with 1,024 tokens a tile, too.

On 26 November 2026 the search ran within 1.1 GiB a rank, on 2 ranks: 1,536 tokens for ours, 1,024 for ALST, in steps of
256 ([raw](data/speed/memory-1.1GiB.json)). A token more took 0.09 MiB of ours and 0.2 MiB of ALST. Within 4 GiB it was
not run: by that, ours would train some 36,000 tokens, whose steps take half an hour each on two cores.
""",
    ),
    "scale": (
        "Scale",
        """
One process, as rank 0 of a group that torch fakes. Python is the process' time in an enabled model less that in a plain
one of the same span, with an attention that does nothing in both.
""",
    ),
}
HEAD = """
# Speed

Written by `python bench/speed.py`, from runs of `sp-attention bench` on one machine, in which all contenders take
turns: each once in every round, in an order that rotates, with the ranks in step. Shown are medians, and quartiles in
brackets. The time of a round is that of the rank that took longest. A rank is a process with one thread, and gloo
carries.

```text
sp-attention bench exchange          # and layer, model, memory, scale
sp-attention bench exchange --quick --ranks 2
sp-attention bench memory --length 8192 --limit 4 --json
sp-attention bench scale --ranks 8 --ranks 1024 --out folder     # a plot, and the numbers as JSON
pip install yunchang deepspeed       # what is installed is measured too; also veomni, ms-swift and verl
```
"""


def page(records: dict[str, Record]) -> str:
    """docs/speed.md, of the runs that there are numbers of."""
    parts = [HEAD.strip()]
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
    return "\n\n".join(parts) + "\n"


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
