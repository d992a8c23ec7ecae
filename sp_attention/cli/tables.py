"""Tables of the documents, in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines without the last line's end; a row has a cell for each of the head."""
    return "\n".join([markdown_row(head), markdown_row(["---"] * len(head)), *map(markdown_row, rows)])


def markdown_row(cells: Sequence[str]) -> str:
    """A line of such a table, for rows that are printed as they come; whatever is in a cell stays in it."""
    inside = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(inside)} |"
