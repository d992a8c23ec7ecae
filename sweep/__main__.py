"""`python -m sweep --mapping causal-lm --types llama,bart --ranks 2`."""

from functools import partial
from itertools import product
from pathlib import Path

import click

from sp_attention.cli.outcomes import VARIANTS
from sp_attention.cli.reduced import TASKS
from sp_attention.cli.reduced.sizes import BEYOND
from sweep.running import sweep, trained
from sweep.table import summary, write

SECONDS_EACH = 20


@click.command()
@click.option("--mapping", "mappings", multiple=True, type=click.Choice([*TASKS]), help="All by default; repeatable.")
@click.option("--types", default="", help="Types of models, with commas between them; all by default.")
@click.option("--ranks", type=click.IntRange(2), multiple=True, default=(2,), show_default=True, help="Repeatable.")
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(16),
    multiple=True,
    default=(33, BEYOND),
    show_default=True,
    help=f"Tokens in a sequence; from {BEYOND} on, thresholds of configurations are below it. Repeatable.",
)
@click.option("--with", "variants", default="", help=f"Also so, with commas: {', '.join(VARIANTS)}.")
@click.option("--again", is_flag=True, help="Run the types that the results have already.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("sweep-results.jsonl"), show_default=True)
@click.option("--table", type=click.Path(path_type=Path), help="Write the tables of all results here: docs/models.md.")
def main(
    mappings: tuple[str, ...],
    types: str,
    ranks: tuple[int, ...],
    lengths: tuple[int, ...],
    variants: str,
    again: bool,
    results: Path,
    table: Path | None,
) -> None:
    """Compare every type of model of transformers' mappings, reduced, with itself in one process."""
    only = set(types.split(",")) - {""}
    also = tuple(filter(None, variants.split(",")))
    compared, seconds = partial(trained, variants=also), SECONDS_EACH * (1 + len(also))
    for mapping, size, length in product(mappings or TASKS, ranks, lengths):
        sweep(mapping, only, size, length, results, compared, seconds, again)
    click.echo(summary(results))
    if table is not None:
        write(results, table)


main()
