"""One layer's attention, from queries, keys and values to its output and back, over what it cannot do without.

That is the raw all-to-all of the exchange and torch's own attention of one rank's heads, both on tensors that are there
already and in the order that they like best, each timed by itself. Ours is the attention function that layers of an
enabled model call; the others' exchanges are around the same kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sp_attention.cli.benchmarks.exchange import BATCH, HEAD_SIZE, HEADS, LIMIT, OURS, TIMEOUT, all_to_all
from sp_attention.cli.benchmarks.others import OTHERS, Exchange, context_parallel, quieten, reasons
from sp_attention.cli.benchmarks.ratios import ratio
from sp_attention.cli.benchmarks.record import Record, Table
from sp_attention.cli.benchmarks.rounds import Seconds, interleaved
from sp_attention.cli.figure import draw_ratios
from sp_attention.cli.reporting import Report, run_reporting
from sp_attention.distributed.peers import Peers
from sp_attention.kernels.registry import candidates
from sp_attention.kernels.request import Mask
from sp_attention.region.attention import AttentionFunction
from sp_attention.region.context import Context, Scope, StackPass
from sp_attention.region.sequence_dims import Extent
from sp_attention.testing import relative_error

LENGTH, KERNEL = 2048, "kernel"
# Relative, in float32: the ranks add up in another order than one process.
TOLERANCE = 1e-4
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One row of LENGTH tokens, HEADS query heads and Hkv key heads, on so many ranks, which divide them all."""

    ranks: int
    kv_heads: int

    def __str__(self) -> str:
        return f"P {self.ranks}, Hkv {self.kv_heads}"


def benchmark(ranks: Sequence[int], rounds: int, quick: bool, report: Callable[[float], None]) -> Record:
    """Measure on new processes; `report` is told what share is done."""
    some = [Case(*one) for one in product(ranks, (4, 16))][: 1 if quick else None]
    record: Record = {"rounds": rounds, "length": LENGTH, "cases": []}
    for number, case in enumerate(some):

        def tell(done: int, before: int = number) -> None:
            report((before + done / rounds) / len(some))

        seconds, absent = run_reporting(case.ranks, measure, case, rounds, report=tell, timeout=TIMEOUT)[0]
        record["cases"].append({"case": asdict(case), "seconds": seconds})
        record["absent"] = absent
    return record


def measure(case: Case, rounds: int, report: Report) -> tuple[Seconds, dict[str, str]]:
    """On every rank of the default process group: seconds, and why there are none of some of the others."""
    quieten()
    why_not = reasons() | {"torch context parallel": context_parallel()}
    peers = Peers(dist.group.WORLD, dist.get_rank(), case.ranks)
    mine = LENGTH // case.ranks
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, case.kv_heads, case.kv_heads)
    whole = [torch.randn(BATCH, LENGTH, one, HEAD_SIZE, generator=generator) for one in heads]
    whole_grad = torch.randn(BATCH, LENGTH, HEADS, HEAD_SIZE, generator=generator)
    span = slice(peers.rank * mine, (peers.rank + 1) * mine)
    given = [tensor[:, span].clone().requires_grad_() for tensor in whole]
    grad = whole_grad[:, span].clone()
    expected = [tensor[:, span] for tensor in _forward_and_backward(torch_attention, whole, whole_grad)]
    steps = {OURS: _ours(peers)} | {
        name: _around_the_kernel(make(mine)) for name, (_, make) in OTHERS.items() if why_not[name] is None
    }
    contenders: dict[str, Callable[[], object]] = {
        LIMIT: all_to_all(sum(heads) * mine * HEAD_SIZE, HEADS * mine * HEAD_SIZE, torch.float32),
        KERNEL: _kernel(case),
    }
    for name, step in steps.items():
        for got, wanted in zip(_forward_and_backward(step, given, grad), expected, strict=True):
            if not relative_error(got, wanted) <= TOLERANCE:
                raise AssertionError(f"{name}: the output or a gradient is not that of one process")
        contenders[name] = partial(_forward_and_backward, step, given, grad)
    interleaved(contenders, 1, 1, lambda number: None)
    absent = {name: reason for name, reason in why_not.items() if reason is not None}
    return interleaved(contenders, rounds, 1, report), absent


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal, on [B, S, h | hkv, D]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _heads_first(query, key, value).transpose(1, 2)


def tables(record: Record) -> list[Table]:
    """Medians over those of the limit, with quartiles."""
    names = _contenders(record)
    rows = []
    for one in record["cases"]:
        seconds, limit = one["seconds"], _limit(one["seconds"])
        parts = " + ".join(f"{median(seconds[part]) * 1e3:.0f} ms" for part in (LIMIT, KERNEL))
        rows.append((str(Case(**one["case"])), parts, *(str(ratio(seconds[name], limit)) for name in names)))
    means = [
        f"{geometric_mean(ratio(one['seconds'][name], _limit(one['seconds'])).middle for one in record['cases']):.2f}"
        for name in names
    ]
    rows.append(("geometric mean", "", *means))
    title = f"One layer's attention, float32, S {record['length']}, over {LIMIT} + {KERNEL}, {record['rounds']} rounds"
    absent = tuple(f"{name}: {reason}" for name, reason in record["absent"].items())
    return [Table(title, ("", f"{LIMIT} + {KERNEL}", *names), tuple(rows), absent)]


def draw(record: Record, file: Path) -> None:
    """A PNG of the ratios."""
    groups = {
        str(Case(**one["case"])): {
            name: ratio(one["seconds"][name], _limit(one["seconds"])) for name in _contenders(record)
        }
        for one in record["cases"]
    }
    draw_ratios(file, "attention of one layer, forward and backward", f"time over {LIMIT} + {KERNEL}", groups)


def _contenders(record: Record) -> list[str]:
    return [name for name in record["cases"][0]["seconds"] if name not in (LIMIT, KERNEL)]


def _limit(seconds: Seconds) -> list[float]:
    return [sum(parts) for parts in zip(seconds[LIMIT], seconds[KERNEL], strict=True)]


def _ours(peers: Peers) -> Step:
    """The attention function of an enabled model, inside of a layer, with the mask that all its layers share."""
    context = Context(Scope(StackPass(Extent(BATCH, LENGTH), peers), is_known=True))
    attention = AttentionFunction(candidates("cpu", "sdpa")[0], peers, context, lambda module: "layer")
    module, mask = nn.Module(), Mask(BATCH, LENGTH, LENGTH, torch.device("cpu"))

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, _ = attention(module, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)
        return out

    return step


def _around_the_kernel(exchange: Exchange) -> Step:
    return lambda query, key, value: exchange(query, key, value, torch_attention)


def _kernel(case: Case) -> Callable[[], object]:
    """torch's attention of one rank's heads, [B, h, S, D]."""
    heads = (HEADS // case.ranks, case.kv_heads // case.ranks, case.kv_heads // case.ranks)
    given = [torch.randn(BATCH, one, LENGTH, HEAD_SIZE).requires_grad_() for one in heads]
    grad = torch.randn(BATCH, heads[0], LENGTH, HEAD_SIZE)

    return partial(_forward_and_backward, _heads_first, given, grad)


def _heads_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def _forward_and_backward(step: Step, given: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of what is given."""
    with_grad = [tensor if tensor.requires_grad else tensor.clone().requires_grad_() for tensor in given]
    out = step(*with_grad)
    return out, *torch.autograd.grad(out, with_grad, grad)
