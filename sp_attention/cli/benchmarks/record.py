"""What a benchmark leaves: plain numbers for JSON, and a table of them for a terminal or a page."""

import os
import platform
from dataclasses import dataclass
from datetime import date
from typing import Any

from sp_attention.cli.machine import installed
from sp_attention.cli.tables import markdown_table
from sp_attention.cli.terminal import show_table, show_text

Record = dict[str, Any]
PACKAGES = ("sp-attention", "torch", "transformers", "veomni", "ms-swift", "yunchang", "deepspeed", "verl")


@dataclass(frozen=True)
class Table:
    """Words and numbers as they are shown. notes: lines below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def surroundings() -> Record:
    """When, on what, and with which versions."""
    return {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name)) is not None},
    }


def show(table: Table) -> None:
    """Write it to a terminal."""
    show_table(table.columns, table.rows, table.title)
    for note in table.notes:
        show_text(note)


def markdown(table: Table) -> str:
    """The same for a page."""
    notes = ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join([f"{table.title}:", "", markdown_table(table.columns, table.rows), *notes])
