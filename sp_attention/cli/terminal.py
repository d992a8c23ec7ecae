"""Tables and sentences for a terminal of any width: no word is broken, nothing is cut. Into a pipe, whole lines."""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from textwrap import wrap

import click

Cells = Sequence[Sequence[str]]
GAP = "  "


def width() -> int | None:
    """The columns of the terminal that standard output goes to; None where it goes elsewhere, as into a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table; a row has a cell for each column."""
    limit = width()
    if title:
        show_text(title)
    click.echo("\n".join(table([columns, *rows], limit)))


def show_text(sentence: str, indent: str = "") -> None:
    """Print a sentence; its lines after the first are set in by two more than `indent`."""
    click.echo("\n".join(text(sentence, width(), indent)))


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and what they are, in two columns; the second folds, and starts where it started."""
    rows, limit = [(name, " ".join(said.split())) for name, said in pairs], width()
    first = max(len(name) for name, _ in rows)
    for name, said in rows:
        lines = [said] if limit is None else _wrapped(said, max(1, limit - first - len(GAP)))
        click.echo("\n".join(f"{part:{first}}{GAP}{line}" for part, line in zip_longest([name], lines, fillvalue="")))


def together(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """What the first of each pair is said of, once for all for which it is the same."""
    found: dict[str, list[str]] = {}
    for said, name in pairs:
        found.setdefault(said, []).append(name)
    return found


def text(sentence: str, limit: int | None, indent: str = "") -> list[str]:
    """A sentence as lines of at most so many columns, unless a word is longer."""
    sentence = " ".join(sentence.split())
    if limit is None:
        return [indent + sentence]
    return _wrapped(sentence, limit, indent, f"{indent}  ")


def table(cells: Cells, limit: int | None) -> Iterator[str]:
    """The lines of a table whose first row are its columns' names, and which is that wide at most.

    Cells fold between words. Where the columns do not fit, there are several tables, each with the first column.
    """
    widths = _widths(cells, limit)
    if widths is None and len(cells[0]) > 2:
        half = (len(cells[0]) + 1) // 2
        yield from table([row[:half] for row in cells], limit)
        yield ""
        yield from table([(row[0], *row[half:]) for row in cells], limit)
        return
    widths = widths or [_longest_word(column) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        folded = [_wrapped(cell, size) for cell, size in zip(row, widths, strict=True)]
        for line in range(max(map(len, folded))):
            parts = [lines[line] if line < len(lines) else "" for lines in folded]
            yield GAP.join(f"{part:{size}}" for part, size in zip(parts, widths, strict=True)).rstrip()
        if number == 0:
            yield GAP.join("─" * size for size in widths)


def _wrapped(sentence: str, limit: int, first: str = "", others: str = "") -> list[str]:
    """Lines of a sentence, with what the first of them begins with, and the others."""
    found = wrap(
        sentence, limit, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
    return found or [""]


def _widths(cells: Cells, limit: int | None) -> list[int] | None:
    """How wide each column is: the widest fold first; None where even their longest words do not fit."""
    columns = list(zip(*cells, strict=True))
    widths = [max(1, *map(len, column)) for column in columns]
    least = [_longest_word(column) for column in columns]
    while limit is not None and sum(widths) + len(GAP) * (len(widths) - 1) > limit:
        can = [i for i, size in enumerate(widths) if size > least[i]]
        if not can:
            return None
        widths[max(can, key=widths.__getitem__)] -= 1
    return widths


def _longest_word(column: Iterable[str]) -> int:
    return max(1, *(len(word) for cell in column for word in (cell.split() or [""])))
