"""Time several things side by side: in every round each of them, in an order that rotates, ranks in step."""

from collections.abc import Callable, Mapping
from time import perf_counter

import torch
import torch.distributed as dist

from sp_attention.cli.reporting import Report

Seconds = dict[str, list[float]]


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, calls: int, report: Report) -> Seconds:
    """Seconds of one call in each round, by contender, of the rank that took longest; the same on every rank.

    Each contender is called `calls` times in a row, after a barrier. `report` is told how many rounds are done.
    """
    names = list(contenders)
    seconds = torch.empty(len(names), rounds, dtype=torch.float64)
    for number in range(rounds):
        for place in range(len(names)):
            index = (number + place) % len(names)
            contender = contenders[names[index]]
            dist.barrier()
            began = perf_counter()
            for _ in range(calls):
                contender()
            seconds[index, number] = (perf_counter() - began) / calls
        report(number + 1)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return dict(zip(names, seconds.tolist(), strict=True))
