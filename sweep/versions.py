"""`python -m sweep.versions`: what comes of types of models with the versions of torch and transformers that run it.

Run in an environment of each version, as tox makes them, it adds a row to docs/data/versions.json, and writes
docs/models-by-version.md of all rows.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

from sp_attention.cli.tables import markdown_table
from sweep.running import sweep, trained
from sweep.table import OUTCOMES, Record, latest, outcome, reason

DATA, PAGE = Path("docs/data/versions.json"), Path("docs/models-by-version.md")
MAPPING, RANKS, LENGTH, SECONDS_EACH = "causal-lm", 2, 33, 60
# One type of each kind: dense, windows, softcap and sinks, chunks, experts, latent attention, absolute positions,
# biases, convolutions, state spaces, delta nets, and a decoder with cross-attention.
CORE = (
    "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "qwen3_moe", "deepseek_v3", "gpt2", "bloom",
    "lfm2", "mamba2", "qwen3_next", "bart",
)  # fmt: skip
# How they train besides, of the core and of every other type.
OF_CORE = ("checkpointing", "reentrant-checkpointing", "two-forwards", "hidden-states")
OF_ALL = ("checkpointing",)
TEXT = """\
# Models by version

What came of causal types of transformers, reduced, on 2 ranks in float64, with versions of transformers and torch:
loss, outputs and every gradient beside those of one process, for plain, padded and packed batches. *core* is {core}
types, one of each kind of attention, mask and mixer, also with activation checkpointing of both kinds, two forwards
before a backward, and hidden states; *all* is every causal type that the version has, also with checkpointing. *partly
refused* is a type that is exact but for some batch or way of training, which is an `UnsupportedError`; *a rank hangs
or dies* is also said of ranks that are not done in time. Reformer hashes by random numbers, which are not those of one
process: it differs with every version. Written by `python -m sweep.versions`, with `--all` for all, in an environment
of each version.

"""


@dataclass(frozen=True)
class Row:
    """What came of some types with some versions. counts: by outcome. told: what is not exact, by type."""

    transformers: str
    torch: str
    types: str
    date: str
    counts: dict[str, int]
    told: dict[str, str]

    @property
    def key(self) -> tuple[list[int], list[int], str]:
        numbers = [[int(part) for part in text.split(".")] for text in (self.transformers, self.torch)]
        return numbers[0], numbers[1], self.types


def row_of(records: list[Record], types: str) -> Row:
    counts = Counter(map(outcome, records))
    told = {record["type"]: f"{outcome(record)}: {reason(record)[:160]}" for record in records if not _is_fine(record)}
    versions = {package: version(package).partition("+")[0] for package in ("transformers", "torch")}
    return Row(**versions, types=types, date=f"{datetime.now(timezone.utc):%Y-%m-%d}", counts=dict(counts), told=told)


def _is_fine(record: Record) -> bool:
    return outcome(record) in ("exact", "not buildable")


def with_row(rows: list[Row], row: Row) -> list[Row]:
    """The rows with this one, in place of an earlier one of the same versions and types."""
    return sorted([*(one for one in rows if one.key != row.key), row], key=lambda one: one.key)


def page(rows: list[Row]) -> str:
    table = [
        [one.transformers, one.torch, one.types, *(str(one.counts.get(name, 0)) for name in OUTCOMES), one.date]
        for one in rows
    ]
    parts = [TEXT.format(core=len(CORE)) + markdown_table(("transformers", "torch", "types", *OUTCOMES, "date"), table)]
    for one in rows:
        if one.told:
            told = markdown_table(("type", "what came of it"), one.told.items())
            parts.append(f"## {one.types}, transformers {one.transformers}, torch {one.torch}\n\n{told}")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


@click.command()
@click.option("--all", "everything", is_flag=True, help="Every causal type, not the core alone.")
@click.option("--results", type=click.Path(path_type=Path), help="Goes on from these; by default one file a version.")
def main(everything: bool, results: Path | None) -> None:
    """Compare types of models with themselves in one process, and write it to docs/models-by-version.md."""
    types = "all" if everything else "core"
    results = results or Path(f"versions-{version('transformers')}-{version('torch')}-{types}.jsonl")
    variants = OF_ALL if everything else OF_CORE
    compared, seconds = partial(trained, variants=variants), SECONDS_EACH * (1 + len(variants))
    sweep(MAPPING, set() if everything else set(CORE), RANKS, LENGTH, results, compared, seconds)
    rows = [Row(**one) for one in json.loads(DATA.read_text())] if DATA.exists() else []
    rows = with_row(rows, row_of([*latest(results).values()], types))
    DATA.write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n")
    PAGE.write_text(page(rows))
    click.echo(PAGE.read_text())


if __name__ == "__main__":
    main()
