"""generate() under sequence parallelism, against one process: `python -m sweep.generation`.

Some models in every way of generating, and every type of model in two. Tokens, scores, and what a rank caches.
"""

import sys
from functools import partial
from pathlib import Path

import click

from sweep.generating import LENGTH, MODES, NAMED, OF_EVERY_TYPE, compare
from sweep.generation_page import is_too_large, page, remarks_of
from sweep.running import sweep
from sweep.table import latest, outcome, summary

SECONDS_TO_ENABLE, SECONDS_A_MODE = 8, 3


@click.command()
@click.option("--mapping", "mappings", multiple=True, type=click.Choice([*NAMED]), help="All by default; repeatable.")
@click.option("--types", default="", help="Types of models, with commas; by default some in all modes, and all in two.")
@click.option("--ranks", type=click.IntRange(2), multiple=True, default=(2, 3), show_default=True, help="Repeatable.")
@click.option("--modes", default=",".join(MODES), show_default=True, help="With commas between them.")
@click.option("--again", is_flag=True, help="Run the types that the results have already.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("sweep-generation.jsonl"), show_default=True)
@click.option("--table", type=click.Path(path_type=Path), help="Write the page here: docs/generation-models.md.")
def main(
    mappings: tuple[str, ...],
    types: str,
    ranks: tuple[int, ...],
    modes: str,
    again: bool,
    results: Path,
    table: Path | None,
) -> None:
    """Generate with models of transformers, reduced, on several ranks and in one process."""

    def run(mapping: str, only: set[str], size: int, modes: tuple[str, ...]) -> None:
        seconds = SECONDS_TO_ENABLE + SECONDS_A_MODE * len(modes)
        sweep(mapping, only, size, LENGTH, results, partial(compare, modes=modes), seconds, again)

    only = set(types.split(",")) - {""}
    for mapping in mappings or NAMED:
        for size in ranks:
            run(mapping, only or {*NAMED[mapping]}, size, tuple(modes.split(",")))
        if not only:
            run(mapping, set(), ranks[0], OF_EVERY_TYPE)
    click.echo(summary(results))
    records = latest(results)
    large = [of for of, record in records.items() if is_too_large(record)]
    for mapping, kind, size, length in large:
        click.echo(
            f"  cache too large: {mapping} {kind} on {size}: {remarks_of(records[mapping, kind, size, length])[-1]}"
        )
    if table is not None:
        table.write_text(page(results))
    sys.exit(bool(large) or any(outcome(record) in ("silently wrong", "other errors") for record in records.values()))


if __name__ == "__main__":
    main()
