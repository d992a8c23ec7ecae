"""What groups of heads spare: `python bench/head_groups.py`, whose numbers are in docs/data/head_groups.json.

One causal attention in float32 on two ranks with one thread each, forward and backward, all at once and in groups: the
most memory of a rank above what stood before, its q, k and v among it, and the time of the faster of two steps after
a first one. The pool of buffers is empty, and glibc gives back what is freed, so that all is seen. Each setting in new
processes; they take turns, as often as there are rounds, and shown are medians.
"""

import json
import os
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch
import torch.distributed as dist

from sp_attention import Mask, Request
from sp_attention.cli.rss import forget_peak, resident_memory
from sp_attention.cli.tables import markdown_row, markdown_table
from sp_attention.distributed import buffer_pool
from sp_attention.distributed.peers import Peers
from sp_attention.kernels.registry import candidates
from sp_attention.launch import run_ranks
from sp_attention.ulysses import head_groups
from sp_attention.ulysses.attention import Kernel, attend, plan_of

FILE = Path(__file__).parent.parent / "docs" / "data" / "head_groups.json"
RANKS, HEADS, KV_HEADS, SIZE = 2, 16, 8, 64
# Groups of heads, and whether the next travel while one computes.
SETTINGS = {
    "all heads at once": (1, False),
    "2 groups": (2, False),
    "4 groups": (4, False),
    "4 groups, the next on its way": (4, True),
    "8 groups": (8, False),
}


def step_of(count: int, early: bool, length: int) -> tuple[int, float]:
    """Bytes and seconds of a step."""
    torch.set_num_threads(1)
    buffer_pool._READY = 0
    head_groups.overlaps = lambda device: early
    peers = Peers(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    kernel = Kernel(next(iter(candidates("cpu", "sdpa"))))
    spent, seconds = 0, []
    for _ in range(3):
        dist.barrier()
        forget_peak()
        before, start = resident_memory("VmRSS"), perf_counter()
        tensors = [
            torch.randn(1, len(peers.span(length)), heads, SIZE, requires_grad=True)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        mask = Mask(1, length, length, torch.device("cpu"), causal=True)
        request = Request(*tensors, mask, scale=SIZE**-0.5)
        groups = head_groups.in_groups(request, count)
        plans = [plan_of(one, peers.size, kernel) for one in groups]
        if count == 1:
            out, _ = attend(request, length, plans[0], peers, kernel)
        else:
            out = head_groups.attend_in_groups(request, length, plans, peers, kernel)
        out.backward(torch.ones_like(out))
        seconds.append(perf_counter() - start)
        spent = resident_memory("VmHWM") - before
        del tensors, request, groups, out, mask
    return spent, min(seconds[1:])


@click.command()
@click.option("--length", default=8192, show_default=True, help="Tokens of the sequence that the two ranks share.")
@click.option("--rounds", default=3, show_default=True)
def main(length: int, rounds: int) -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, (count, early) in SETTINGS.items():
            ranks = run_ranks(RANKS, step_of, count, early, length, timeout=900)
            found[name].append((max(spent for spent, _ in ranks), max(seconds for _, seconds in ranks)))
    sizes = {"ranks": RANKS, "heads": HEADS, "kv_heads": KV_HEADS, "head_size": SIZE, "length": length}
    record: dict[str, Any] = {"date": f"{date.today()}", "torch": torch.__version__, "sizes": sizes, "runs": found}
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{sizes}\n" + markdown_table(["", "MiB of a rank", "÷ all at once", "seconds"], []))
    whole = median(spent for spent, _ in found["all heads at once"])
    for name, runs in found.items():
        spent, seconds = (median(one[place] for one in runs) for place in (0, 1))
        print(markdown_row([name, f"{spent / 2**20:.0f}", f"{spent / whole:.2f}", f"{seconds:.1f}"]))


if __name__ == "__main__":
    main()
