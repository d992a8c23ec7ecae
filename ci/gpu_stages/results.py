"""What a stage found: a file of rows and its page, written anew after every row, so what is killed leaves what it has.

A row is tried once. The file says which row is under way, so that a stage that is started again after its process ended
goes on behind it, and the row says so. Several processes may write one after the other: each loads the file anew.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from sp_attention.cli.tables import markdown_table

Row = dict[str, Any]
# How a process ends that its device lets do nothing more: it is started again, behind the row that did it.
AGAIN = 75
# How outcomes begin that nothing is wrong with. Those of `BAD` are.
RIGHT, REFUSED, NOT_RUN, CANNOT = "right", "refused", "not run", "cannot"
WRONG, FAILED, ENDED = "wrong", "failed", "the process ended"
BAD = (WRONG, FAILED, ENDED)
# What errors say after which a device does nothing more for a process.
_BROKEN = ("CUDA error", "device-side assert", "illegal memory access", "AcceleratorError")


def told(error: BaseException) -> str:
    """One line of it, cut where it gets long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@dataclass
class Results:
    """Of one stage. folder: where <stage>.json and <stage>.md are. facts: of machine and run, as the page begins."""

    folder: Path
    stage: str
    facts: Row = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    under_way: Row | None = None
    ended: str | None = None

    @property
    def file(self) -> Path:
        return self.folder / f"{self.stage}.json"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return float(self.facts.get("until", float("inf"))) - time()

    def row(
        self, table: str, key: Mapping[str, str], measure: Callable[[], Mapping[str, Any]], needs: float = 0.0
    ) -> Row:
        """The row of a table that has this key: what `measure` gives, or why it gives nothing; nothing is raised.

        needs: seconds that it takes, so that it is not begun where fewer are left.
        """
        found = self.find(table, key)
        if found is not None:
            return found
        if self.left < needs:
            return self.add(table, key, {"outcome": f"{NOT_RUN}: it takes {needs:.0f} s, and {self.left:.0f} are left"})
        self.under_way = {"table": table, "key": dict(key)}
        self.write()
        broken = False
        try:
            values = measure()
        except Exception as error:  # whatever a kernel, a package or a device does: it is told, and the others go on
            values = {"outcome": f"{FAILED}: {told(error)}"}
            broken = any(word in told(error) for word in _BROKEN)
        row = self.add(table, key, values)
        if broken:
            os._exit(AGAIN)
        return row

    def find(self, table: str, key: Mapping[str, str]) -> Row | None:
        rows = self.tables.get(table, [])
        return next((row for row in rows if {name: row.get(name) for name in key} == dict(key)), None)

    def add(self, table: str, key: Mapping[str, str], values: Mapping[str, Any]) -> Row:
        row = {**key, **values}
        self.tables.setdefault(table, []).append(row)
        self.under_way = None
        self.write()
        return row

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.write()

    def bad(self) -> Iterator[str]:
        """What is wrong, in words."""
        for table, rows in self.tables.items():
            for row in rows:
                for name, value in row.items():
                    if isinstance(value, str) and value.startswith(BAD):
                        others = [str(other) for other in row.values() if other is not value and isinstance(other, str)]
                        yield f"{table}: {', '.join(others[:4])}: {name}: {value}"

    def write(self) -> None:
        """Both files, each in one step, so that none is ever half written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.file, json.dumps(_plain(self), indent=1) + "\n")
        _replace(self.file.with_suffix(".md"), page(self))


def load(file: Path) -> Results:
    """What a file has; a row that was under way is one whose process ended."""
    data = json.loads(file.read_text())
    results = Results(file.parent, **data)
    if results.under_way is not None:
        where = results.under_way
        results.add(where["table"], where["key"], {"outcome": f"{ENDED} in it"})
    return results


def peek(file: Path) -> Results:
    """What a file has, while another process writes it."""
    return Results(file.parent, **json.loads(file.read_text()))


def page(results: Results) -> str:
    """Markdown of it."""
    facts = {name: value for name, value in results.facts.items() if name not in ("until", "stand_in")}
    parts = [f"# Stage {results.stage}, {results.facts.get('device', 'no device')}, {results.facts.get('date', '')}"]
    if results.facts.get("stand_in"):
        parts.append(f"**Stand-ins, and nothing about a device:** {results.facts['stand_in']}")
    parts.append(f"{results.ended or 'It has not come to its end: what follows is what there is.'}")
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    parts += results.notes
    parts += [f"## {title}\n\n{_table(rows)}" for title, rows in results.tables.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table(names, ([_cell(row.get(name, "")) for name in names] for row in rows))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return f"**{text}**" if text.startswith(BAD) else text


def _plain(results: Results) -> Row:
    names = ("stage", "facts", "notes", "under_way", "ended", "tables")
    return {name: getattr(results, name) for name in names}


def _replace(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_text(text)
    draft.replace(file)
