"""What a layer costs one rank of very many: bytes, collectives, and the time of Python, on groups that do nothing.

One process is rank 0 of a group that torch fakes: its collectives return at once, with nothing moved. A small model of
real tensors runs whole forwards, enabled and plain, with an attention that returns its queries. So the difference in
the process' time is that of hooks, agreement and exchange. Two depths tell a layer's from a forward's.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, MistralConfig, MistralModel, PreTrainedModel

import sp_attention
from sp_attention.cli.benchmarks.exchange import TIMEOUT
from sp_attention.cli.benchmarks.others import quieten
from sp_attention.cli.benchmarks.record import Record, Table
from sp_attention.cli.figure import draw_lines
from sp_attention.cli.reporting import Report, run_reporting
from sp_attention.kernels.request import Request
from sp_attention.region.attention import AttentionFunction
from sp_attention.region.attn_implementation import register

# Tokens of a rank, and the depths of the two models, of little width besides their heads.
SPAN, SHALLOW, DEEP, WIDTH = 2, 2, 6, 64
NOTHING = "returns_queries"


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, and their size."""

    query: int
    kv: int
    size: int

    def __str__(self) -> str:
        return f"{self.query} heads, {self.kv} key heads of {self.size}"


# As many as there are ranks at most, and those of the largest Llama.
SHAPES = (Heads(1024, 1024, 8), Heads(128, 8, 128))


@dataclass(frozen=True)
class Cost:
    """Of a layer of rank 0 in a group of `ranks`.

    sent, received: bytes for each of its tokens, forward and backward, but for what it sends itself; float32.
    collectives: their names, in order, forward and backward. layer, forward: the time that sequence parallelism adds
    to a layer and, besides that, to a forward, in microseconds.
    """

    ranks: int
    heads: Heads
    sent: float
    received: float
    collectives: list[str]
    layer: float
    forward: float


def benchmark(ranks: Sequence[int], rounds: int, report: Callable[[float], None]) -> Record:
    """Measure on one new process; `report` is told what share is done."""
    cases = [*product(ranks, SHAPES)]
    costs = run_reporting(1, measure, cases, rounds, report=lambda done: report(done / len(cases)), timeout=TIMEOUT)[0]
    return {"rounds": rounds, "span": SPAN, "cases": [asdict(cost) for cost in costs]}


def measure(cases: list[tuple[int, Heads]], rounds: int, report: Report) -> list[Cost]:
    """In a process with a process group of its own, which is given up."""
    quieten()
    transformers.logging.set_verbosity_error()
    dist.destroy_process_group()
    AttentionInterface.register(NOTHING, _returns_queries)
    costs = []
    for number, (ranks, heads) in enumerate(cases):
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        costs.append(_cost(ranks, heads, rounds))
        dist.destroy_process_group()
        report(number + 1)
    return costs


def tables(record: Record) -> list[Table]:
    """A table for each number of heads."""
    found = []
    for heads in dict.fromkeys(str(Heads(**one["heads"])) for one in record["cases"]):
        rows = [
            (
                str(one["ranks"]),
                f"{one['layer']:.0f} µs",
                f"{one['forward']:.0f} µs",
                f"{one['sent'] / 1024:.1f} KiB",
                f"{one['received'] / 1024:.1f} KiB",
                ", ".join(f"{one['collectives'].count(name)} {name}" for name in dict.fromkeys(one["collectives"])),
            )
            for one in record["cases"]
            if str(Heads(**one["heads"])) == heads
        ]
        columns = ("ranks", "Python, a layer's forward", "a forward besides", "sent", "received", "collectives")
        title = f"One layer of a rank that shares {heads}; bytes for each of its tokens, float32, forward and backward"
        found.append(Table(title, columns, tuple(rows)))
    return found


def draw(record: Record, file: Path) -> None:
    """A PNG of the time that a layer takes, by ranks."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in record["cases"]:
        lines.setdefault(str(Heads(**one["heads"])), []).append((one["ranks"], one["layer"]))
    draw_lines(file, "Python of sequence parallelism in a layer's forward", "ranks", "µs", lines)


def _cost(ranks: int, heads: Heads, rounds: int) -> Cost:
    enabled, plain = ([build(depth, heads, ranks) for depth in (SHALLOW, DEEP)] for build in (_enabled, _plain))
    whole, mine = (torch.zeros(1, tokens, dtype=torch.int64) for tokens in (SPAN * ranks, SPAN))
    runs = {
        (name, depth): (model, ids)
        for name, models, ids in (("enabled", enabled, whole), ("plain", plain, mine))
        for depth, model in zip((SHALLOW, DEEP), models, strict=True)
    }
    seconds: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    for number in range(rounds + 1):
        for run, (model, ids) in runs.items():
            began = process_time()
            model(input_ids=ids, use_cache=False)
            if number:  # The first round warms up.
                seconds[run].append(process_time() - began)
    middle = {run: median(times) for run, times in seconds.items()}
    layers = {name: (middle[name, DEEP] - middle[name, SHALLOW]) / (DEEP - SHALLOW) for name in ("enabled", "plain")}
    layer = layers["enabled"] - layers["plain"]
    forward = middle["enabled", SHALLOW] - middle["plain", SHALLOW] - SHALLOW * layer
    shallow, deep = (_Collectives.of(lambda model=model: _step(model, whole)) for model in enabled)  # type: ignore[misc]
    names = list(deep.names)
    for name in shallow.names:
        names.remove(name)
    of_a_layer = DEEP - SHALLOW
    return Cost(
        ranks,
        heads,
        (deep.sent - shallow.sent) / of_a_layer / SPAN,
        (deep.received - shallow.received) / of_a_layer / SPAN,
        [name for name in dict.fromkeys(names) for _ in range(names.count(name) // of_a_layer)],
        layer * 1e6,
        forward * 1e6,
    )


def _step(model: PreTrainedModel, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()


def _enabled(depth: int, heads: Heads, ranks: int) -> PreTrainedModel:
    """Enabled while it has no weights, so that nothing but shapes is computed then."""
    model = _empty(depth, heads, ranks)
    handle = sp_attention.enable(model, backend="sdpa", rehearse=False)
    assert handle.peers is not None
    assert handle.hooks is not None
    backend = sp_attention.Backend("cpu", NOTHING, _queries)
    attention = AttentionFunction(backend, handle.peers, handle.hooks.context, lambda module: "layer")
    register(str(model.config._attn_implementation), attention)
    return _filled(model)


def _plain(depth: int, heads: Heads, ranks: int) -> PreTrainedModel:
    model = _filled(_empty(depth, heads, ranks))
    model.set_attn_implementation(NOTHING)
    return model


def _empty(depth: int, heads: Heads, ranks: int) -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=heads.query,
        num_key_value_heads=heads.kv,
        head_dim=heads.size,
        sliding_window=None,
        max_position_embeddings=SPAN * ranks,
    )
    with torch.device("meta"):
        model: PreTrainedModel = MistralModel(config).eval()
    return model


def _filled(model: PreTrainedModel) -> PreTrainedModel:
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.rotary_emb = type(model.rotary_emb)(model.config)  # its tables are no parameters
    return model


def _queries(request: Request) -> Tensor:
    return request.query


def _returns_queries(module: nn.Module, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


class _Collectives(TorchDispatchMode):
    """Notes each collective within it, and what rank 0 sends others and gets from them, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.sent = self.received = 0

    @classmethod
    def of(cls, step: Callable[[], None]) -> "_Collectives":
        seen = cls()
        with seen:
            step()
        return seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.rstrip("_")
            self.names.append(name)
            if name == "alltoall_base":
                received, sent, _, _, to_each = args[:5]
                size = sent.element_size()
                kept = to_each[0] * sent[0].numel() if to_each else sent.numel() // dist.get_world_size()
                self.sent += (sent.numel() - kept) * size
                self.received += (received.numel() - kept) * size
        return func(*args, **(kwargs or {}))
