"""Training with every engine on groups of ranks, against one process: `python -m sweep.engines`.

20 steps of SGD without clipping, on micro-batches of unequal length and numbers of targets, in float64.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import click
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sp_attention
from sp_attention.cli.comparison import largest_error
from sp_attention.launch import run_ranks

STEPS, LEARNING_RATE = 20, 0.1
# Groups, and the ranks of each.
SHAPES = ("1 x 1", "1 x 2", "1 x 4", "2 x 1", "2 x 2")
ACCUMULATIONS = (1, 3)
VOCABULARY, IGNORED = 97, -100
# Of any relative error.
BOUND = 1e-6
Batch = dict[str, Tensor]

HEAD = """# Engines

Written by `python -m sweep.engines`: a small Mistral with uneven heads, a window, padding and tied embeddings, trained
for 20 steps of SGD at a learning rate of 0.1, without clipping, on micro-batches of unequal lengths and numbers of
targets. The largest relative difference on any rank from one process that is given the batches of all groups: of any
step's loss and gradient norm; of any weight after the first step; and of any weight after 20 steps, by shape (groups x
ranks of a group) and with 1 or 3 accumulated micro-batches. In float64, of which transformers computes the loss in
float32, and DeepSpeed the gradients; ZeRO-0 is in float32, and tells no norm. Shapes of 1 rank a group are the engine
alone, without sequence parallelism.

"""


@dataclass
class Loop:
    """What an engine makes of a model, in the words of a training loop.

    model: is called. is_last: is told before each forward whether gradients are averaged in its backward. step: after
    the last backward; leaves no gradients behind, and returns their norm, None where an engine has none to tell.
    weights: all of them, whole, on every rank.
    """

    model: nn.Module
    is_last: Callable[[bool], None]
    backward: Callable[[Tensor], None]
    step: Callable[[], float | None]
    weights: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Run:
    """losses and norms: of each step. first, last: the weights after the first step and after all."""

    losses: list[float]
    norms: list[float | None]
    first: dict[str, Tensor]
    last: dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """The largest relative errors: of a step's loss and norm, of a weight after the first step and after all.

    Infinite where there is no number; NaN for norms that an engine does not tell.
    """

    loss: float
    norm: float
    first: float
    last: float


# The engines


def _of_torch(
    model: nn.Module, wrapped: nn.Module, is_last: Callable[[bool], None], before_step: Callable[[], None]
) -> Loop:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> float:
        before_step()
        norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def weights() -> dict[str, Tensor]:
        return {
            name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
            for name, weight in model.named_parameters()
        }

    return Loop(wrapped, is_last, Tensor.backward, step, weights)


def none(model: nn.Module, accumulation: int, sp_size: int) -> Loop:
    return _of_torch(model, model, lambda last: None, partial(sp_attention.average_gradients, model))


def ddp(model: nn.Module, accumulation: int, sp_size: int, **options: bool) -> Loop:
    wrapped = DistributedDataParallel(model, **options)

    def is_last(last: bool) -> None:
        # What `no_sync` does, which torch itself does not take in the first backward of a static graph.
        wrapped.require_backward_grad_sync = last or wrapped.static_graph

    return _of_torch(model, wrapped, is_last, lambda: None)


def fsdp2(
    model: nn.Module, accumulation: int, sp_size: int, *, hybrid: bool = False, offload: OffloadPolicy | None = None
) -> Loop:
    world = dist.get_world_size()
    # Hybrid: weights are sharded in a group, and replicated over groups.
    shape, names = ((world // sp_size, sp_size), ("replicate", "shard")) if hybrid else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh, offload_policy=offload or OffloadPolicy())
    return _of_torch(model, model, model.set_requires_gradient_sync, lambda: None)


def zero(model: nn.Module, accumulation: int, sp_size: int, *, stage: int) -> Loop:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": f"{dist.get_rank()}", "LOCAL_RANK": f"{dist.get_rank()}"}
    os.environ |= {"WORLD_SIZE": f"{dist.get_world_size()}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    import deepspeed
    import deepspeed.ops

    # What it would compile for CPUs as soon as it starts, training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if not stage:
        model.float()  # It takes no float64 on CPUs.
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    lasts = [True]

    def backward(loss: Tensor) -> None:
        # Stage 0 divides the model's own tensor by the accumulated micro-batches, asked or not.
        engine.backward(loss * 1, scale_wrt_gas=False)
        if not lasts[0]:
            engine.step()

    def step() -> float | None:
        engine.step()
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def weights() -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters([*model.parameters()]):
            return {name: weight.detach().double().clone() for name, weight in model.named_parameters()}

    return Loop(engine, partial(lasts.__setitem__, 0), backward, step, weights)


ENGINES: dict[str, Callable[[nn.Module, int, int], Loop]] = {
    "none": none,
    "DDP": ddp,
    "DDP, static graph": partial(ddp, static_graph=True),
    "DDP, unused parameters": partial(ddp, find_unused_parameters=True),
    "FSDP2": fsdp2,
    "FSDP2, offloaded": partial(fsdp2, offload=CPUOffloadPolicy(pin_memory=False)),
    "HSDP": partial(fsdp2, hybrid=True),
    **{f"ZeRO-{stage}": partial(zero, stage=stage) for stage in range(4)},
}
EITHER_ORDER = ("DDP", "FSDP2")


# Training


def build() -> transformers.PreTrainedModel:
    """Six heads, three of keys, a window, tied embeddings; weights so large that a wrong mask shows."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        sliding_window=5,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return transformers.MistralForCausalLM(config).double()


def micro_batch(step: int, group: int, number: int) -> Batch:
    """Two rows of 9 to 33 tokens, the first one padded on the left, with 3 to about 60 targets."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * group + number)
    length, targets = (int(torch.randint(*bounds, (), generator=generator)) for bounds in ((9, 34), (2, 9)))
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    labels = ids.clone()
    labels[:, : length - targets if number % 2 else length // 3 + 1] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(loop: Loop, groups: list[int], of: int, accumulation: int) -> Run:
    """Train on the batches of some of the groups, of `of` in all; one process alone takes those of all."""
    losses, norms, first = [], [], {}
    for step in range(STEPS):
        every = [[micro_batch(step, group, number) for number in range(accumulation)] for group in range(of)]
        items = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batches in every for batch in batches)
        mine = [batch for group in groups for batch in every[group]]
        total = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(mine):
            loop.is_last(number == len(mine) - 1)
            # As Trainer has it: the mean over groups, which engines take, makes a sum of it.
            loss = loop.model(**batch, num_items_in_batch=items * len(groups) / of).loss
            loop.backward(loss)
            total += loss.detach()
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
        norms.append(loop.step())
        if step == 0:
            first = loop.weights()
    return Run(losses, norms, first, loop.weights())


def errors_of(engine: str, wrapped_first: bool, sp_size: int, accumulation: int) -> Errors:
    """On every rank: train with an engine, and alone on the batches of all groups."""
    warnings.simplefilter("ignore")
    groups = dist.get_world_size() // sp_size
    model = build()
    if wrapped_first:
        loop = ENGINES[engine](model, accumulation, sp_size)
        handle = sp_attention.enable(loop.model, backend="sdpa", sp_size=sp_size)
    else:
        handle = sp_attention.enable(model, backend="sdpa", sp_size=sp_size)
        loop = ENGINES[engine](model, accumulation, sp_size)
    run = train(loop, [handle.data_parallel_rank], groups, accumulation)
    return _compared(run, _alone(groups, accumulation))


def _alone(groups: int, accumulation: int) -> Run:
    model = build()
    loop = _of_torch(model, model, lambda last: None, lambda: None)
    return train(loop, list(range(groups)), groups, accumulation)


def _compared(run: Run, expected: Run) -> Errors:
    def of_numbers(values: Sequence[float | None], others: Sequence[float | None]) -> float:
        pairs = [(value, other) for value, other in zip(values, others, strict=True) if value is not None and other]
        errors = [abs(value - other) / abs(other) for value, other in pairs]
        # What is no number is as wrong as can be, and not what `max` passes over.
        return max((error if math.isfinite(error) else math.inf for error in errors), default=math.nan)

    return Errors(
        of_numbers(run.losses, expected.losses),
        of_numbers(run.norms, expected.norms),
        largest_error(run.first, expected.first)[0],
        largest_error(run.last, expected.last)[0],
    )


# The page

Case = tuple[str, bool, int, int, int]  # engine, wrapped first, ranks of a group, groups, accumulated micro-batches


def measured(engines: list[str], shapes: list[str], report: Callable[[str], None]) -> dict[Case, Errors]:
    """The worst rank's errors of every case."""
    found: dict[Case, Errors] = {}
    for engine in engines:
        for shape in shapes:
            report(f"{engine}, {shape}")
            groups, sp_size = map(int, shape.split(" x "))
            every = run_ranks(sp_size * groups, _errors_of_both, engine, sp_size, timeout=600)
            for (first, accumulation), _ in every[0].items():
                each = [astuple(ranks[first, accumulation]) for ranks in every]
                found[engine, first, sp_size, groups, accumulation] = Errors(*map(max, zip(*each, strict=True)))
    return found


def _errors_of_both(engine: str, sp_size: int) -> dict[tuple[bool, int], Errors]:
    orders = (False, True) if engine in EITHER_ORDER else (False,)
    return {
        (first, accumulation): errors_of(engine, first, sp_size, accumulation)
        for first in orders
        for accumulation in ACCUMULATIONS
    }


def page(found: dict[Case, Errors]) -> str:
    """docs/engines.md."""
    shapes = dict.fromkeys(case[2:] for case in found)
    head = ["engine", "loss", "`grad_norm`", "weights, step 1"]
    head += [f"{groups} x {size}{', 3 micro-batches' if number > 1 else ''}" for size, groups, number in shapes]
    rows = [head, ["---"] * len(head)]
    for engine, first in dict.fromkeys((case[0], case[1]) for case in found):
        mine = {case[2:]: errors for case, errors in found.items() if case[:2] == (engine, first)}
        worst = [max(getattr(errors, name) for errors in mine.values()) for name in ("loss", "norm", "first")]
        worst += [mine[shape].last for shape in shapes]
        told = ["" if math.isnan(error) else f"{error:.0e}" for error in worst]
        rows.append([f"{engine}{', before `enable`' if first else ''}", *told])
    return HEAD + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


@click.command()
@click.option("--engine", "engines", multiple=True, type=click.Choice([*ENGINES]), help="All by default; repeatable.")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(SHAPES), help="All by default; repeatable.")
@click.option("--table", type=click.Path(path_type=Path), help="Write the page here: docs/engines.md.")
def main(engines: tuple[str, ...], shapes: tuple[str, ...], table: Path | None) -> None:
    """Train with every engine, and compare losses, norms and weights with one process."""
    found = measured([*engines] or [*ENGINES], [*shapes] or [*SHAPES], partial(click.echo, err=True))
    text = page(found)
    click.echo(text)
    if table is not None:
        table.write_text(text)
    sys.exit(any(error >= BOUND for errors in found.values() for error in astuple(errors)))


if __name__ == "__main__":
    main()
