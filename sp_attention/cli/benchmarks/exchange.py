"""The exchange with nothing in between, forward and backward, over the all-to-all calls that it cannot do without.

The limit is four `all_to_all_single`, two forward and two backward, of the bytes that have to move, on buffers that are
there already. Attention is replaced by what returns the queries; the gradients that it would give to keys and values
are given. Everyone is checked before he is timed: what comes out, and every gradient, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median

import torch
import torch.distributed as dist
from torch import Tensor

from sp_attention.cli.benchmarks.others import OTHERS, Exchange, Kernel, quieten, reasons
from sp_attention.cli.benchmarks.ratios import Ratio, ratio
from sp_attention.cli.benchmarks.record import Record, Table
from sp_attention.cli.benchmarks.rounds import Seconds, interleaved
from sp_attention.cli.figure import draw_ratios
from sp_attention.cli.reporting import Report, run_reporting
from sp_attention.distributed.peers import Peers
from sp_attention.ulysses.all_to_all import head_to_seq, seq_to_head
from sp_attention.ulysses.head_plan import head_plan

LIMIT, OURS = "all-to-all", "sp-attention"
BATCH, HEADS, HEAD_SIZE = 1, 16, 64
# In a row, so that the ranks' start after a barrier is not a part of what is small.
TOKENS = 8192
TIMEOUT = 6 * 3600.0


@dataclass(frozen=True)
class Case:
    """One row of S tokens, HEADS query heads and Hkv key heads, on so many ranks, which divide them all."""

    ranks: int
    dtype: str
    length: int
    kv_heads: int

    def __str__(self) -> str:
        return f"P {self.ranks}, {self.dtype}, S {self.length}, Hkv {self.kv_heads}"


def cases(ranks: int, quick: bool) -> list[Case]:
    """Two dtypes, two lengths and two numbers of key heads; the smallest of them if quick."""
    every = product(("bfloat16", "float32"), (2048, 8192), (4, 16))
    return [Case(ranks, *one) for one in every][: 1 if quick else None]


def benchmark(ranks: Sequence[int], rounds: int, quick: bool, report: Callable[[float], None]) -> Record:
    """Measure on new processes, `ranks` of them, one group after the other; `report` is told what share is done."""
    record: Record = {"rounds": rounds, "cases": [], "absent": {}}
    for number, size in enumerate(ranks):
        some = cases(size, quick)

        def tell(done: int, before: int = number, of: int = rounds * len(some)) -> None:
            report((before + done / of) / len(ranks))

        measured = run_reporting(size, measure, some, rounds, report=tell, timeout=TIMEOUT)[0]
        record["cases"] += measured["cases"]
        record["absent"] = measured["absent"]
    return record


def measure(cases: list[Case], rounds: int, report: Report) -> Record:
    """On every rank of the default process group: seconds by case, and why there are none of some of the others.

    `report` is told how many rounds are done, of all cases.
    """
    quieten()
    why_not = reasons()
    others = [name for name, reason in why_not.items() if reason is None]
    measured = []
    for number, case in enumerate(cases):

        def tell(done: int, before: int = number * rounds) -> None:
            report(before + done)

        seconds = _timed(case, rounds, others, tell)
        measured.append({"case": asdict(case), "seconds": seconds})
    return {"cases": measured, "absent": {name: reason for name, reason in why_not.items() if reason is not None}}


def tables(record: Record) -> list[Table]:
    """Geometric means over all cases, and the medians of each case over the limit's, with quartiles."""
    names = _contenders(record)
    ratios = {name: [ratio(one["seconds"][name], one["seconds"][LIMIT]) for one in record["cases"]] for name in names}
    means = [
        (name, f"{geometric_mean(middles):.2f}", f"{min(middles):.2f} to {max(middles):.2f}")
        for name in names
        for middles in [[one.middle for one in ratios[name]]]
    ]
    each = [
        (
            str(Case(**one["case"])),
            f"{median(one['seconds'][LIMIT]) * 1e3:.1f} ms",
            *(str(ratios[name][number]) for name in names),
        )
        for number, one in enumerate(record["cases"])
    ]
    absent = tuple(f"{name}: {reason}" for name, reason in record["absent"].items())
    count = f"{len(each)} case{'s' * (len(each) > 1)}, {record['rounds']} rounds"
    return [
        Table(f"Exchange over {LIMIT} alone", ("", f"geometric mean, {count}", "of cases"), tuple(means), absent),
        Table("Each case: median and quartiles", ("", LIMIT, *names), tuple(each)),
    ]


def draw(record: Record, file: Path) -> None:
    """A PNG of the ratios of every case, and of their geometric means."""
    names = _contenders(record)
    groups = {
        str(Case(**one["case"])): {name: ratio(one["seconds"][name], one["seconds"][LIMIT]) for name in names}
        for one in record["cases"]
    }
    means = {name: geometric_mean(group[name].middle for group in groups.values()) for name in names}
    drawn = groups | {"geometric mean": {name: Ratio(mean, mean, mean) for name, mean in means.items()}}
    draw_ratios(file, "exchange, forward and backward", f"time over {LIMIT} alone", drawn)


def _contenders(record: Record) -> list[str]:
    return [name for name in record["cases"][0]["seconds"] if name != LIMIT]


def _timed(case: Case, rounds: int, others: list[str], report: Report) -> Seconds:
    peers = Peers(dist.group.WORLD, dist.get_rank(), case.ranks)
    work = _Work(case, peers)
    exchanges = {OURS: ours(case.length, peers)} | {name: OTHERS[name][1](work.mine) for name in others}
    contenders: dict[str, Callable[[], object]] = {
        LIMIT: all_to_all(sum(t.numel() for t in work.given), work.given[0].numel(), work.dtype)
    }
    for name, exchange in exchanges.items():
        work.check(name, exchange)
        contenders[name] = work.step(exchange)
    interleaved(contenders, 1, 1, lambda number: None)
    return interleaved(contenders, rounds, TOKENS // case.length, report)


def all_to_all(there: int, back: int, dtype: torch.dtype) -> Callable[[], None]:
    """The calls of a forward and a backward, of so many numbers there and back, on buffers that stay."""
    sent, received = ([torch.ones(size, dtype=dtype) for size in (there, back)] for _ in range(2))

    def move() -> None:
        for which in (0, 1, 1, 0):
            dist.all_to_all_single(received[which], sent[which])

    return move


def ours(length: int, peers: Peers) -> Exchange:
    """This library's exchange of a sequence of `length`, around any kernel."""

    def exchange(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        plan = head_plan(query.shape[2], key.shape[2], peers.size)
        return head_to_seq(kernel(*seq_to_head(query, key, value, length, plan, peers)), plan, peers)

    return exchange


class _Work:
    """What everyone is given in a case: [B, s, H | Hkv, D] and the gradients of what comes out."""

    def __init__(self, case: Case, peers: Peers) -> None:
        self.dtype, self.size, self.mine = getattr(torch, case.dtype), case.ranks, case.length // case.ranks
        heads = (HEADS, case.kv_heads, case.kv_heads)
        generator = torch.Generator().manual_seed(0)

        def whole(heads: int) -> Tensor:
            shape = (BATCH, case.length, heads, HEAD_SIZE)
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.dtype)

        span = slice(peers.rank * self.mine, (peers.rank + 1) * self.mine)
        values, grads = [whole(one) for one in heads], [whole(one) for one in heads]
        query, key, value = (value[:, span].clone().requires_grad_() for value in values)
        self.given = query, key, value
        # Of the output, and of the keys and values of my heads, as a kernel would give them.
        my_heads = [slice(peers.rank * one // self.size, (peers.rank + 1) * one // self.size) for one in heads]
        self.arrives = [value[:, :, cut].clone() for value, cut in zip(values, my_heads, strict=True)]
        self.expected = [grad[:, span].clone() for grad in grads]
        arriving = [grad[:, :, cut].clone() for grad, cut in zip(grads, my_heads, strict=True)]
        # The queries that arrive have none besides that of the output, which they are.
        self.grads = [self.expected[0], *arriving[1:]]

    def step(self, exchange: Exchange) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and backward, to the gradients of what was given."""
        return lambda: self._forward_and_backward(exchange)[1]

    def check(self, name: str, exchange: Exchange) -> None:
        """Raise unless all that arrives, comes out and flows back is what it must be, bit for bit."""
        (out, key, value), grads = self._forward_and_backward(exchange)
        pairs = [
            (out, self.given[0]),
            (key, self.arrives[1]),
            (value, self.arrives[2]),
            *zip(grads, self.expected, strict=True),
        ]
        for what, (got, wanted) in zip(("output", "key", "value", "dq", "dk", "dv"), pairs, strict=True):
            if not torch.equal(got, wanted):
                raise AssertionError(f"{name}: {what} is not what it must be")

    def _forward_and_backward(self, exchange: Exchange) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        arrived: list[Tensor] = []

        def identity(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            arrived.extend((key, value))
            return query

        out = exchange(*self.given, identity)
        results = (out, *arrived)
        return results, torch.autograd.grad(results, self.given, self.grads)
