"""Training with every engine on groups of ranks, against one process: `python -m sweep.engines`.

20 steps of SGD without clipping, on micro-batches of unequal length and numbers of targets, in float64.
"""

import math
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
from torch import Tensor

import sp_attention
from sp_attention.cli.differences import largest_error
from sp_attention.cli.tables import markdown_table
from sp_attention.launch import run_ranks
from sweep.engine_loops import EITHER_ORDER, ENGINES, Loop, of_torch

STEPS = 20
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
    loop = of_torch(model, model, lambda last: None, lambda: None)
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
    rows = []
    for engine, first in dict.fromkeys((case[0], case[1]) for case in found):
        mine = {case[2:]: errors for case, errors in found.items() if case[:2] == (engine, first)}
        worst = [max(getattr(errors, name) for errors in mine.values()) for name in ("loss", "norm", "first")]
        worst += [mine[shape].last for shape in shapes]
        told = ["" if math.isnan(error) else f"{error:.0e}" for error in worst]
        rows.append([f"{engine}{', before `enable`' if first else ''}", *told])
    return f"{HEAD}{markdown_table(head, rows)}\n"


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
