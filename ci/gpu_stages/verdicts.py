"""From the result of stage masks to `sp_attention/kernels/seen_on_devices.py`, by which is refused and taken."""

from collections.abc import Iterable
from pathlib import Path

from gpu_stages import machine
from gpu_stages.masks import BACKENDS, CASES
from gpu_stages.results import BAD, CANNOT, RIGHT, Results, Row, peek
from sp_attention.kernels.seen_on_devices import SEEN, Seen

TEXT = "write what a result of stage masks has seen into the table by which kernels refuse"
TABLE = machine.ROOT / "sp_attention" / "kernels" / "seen_on_devices.py"
_MARK = "SEEN: tuple[Seen, ...] = ("


def main(file: Path, table: Path = TABLE) -> int:
    results = peek(file)
    problem = why_not(results)
    if problem is not None:
        print(f"no verdict comes of {file}: {problem}")
        return 1
    found = seen_in(results)
    table.write_text(text(merged(SEEN, found), table.read_text()))
    right = sum(seen.right for seen in found)
    print(f"{table}: {right} right and {len(found) - right} wrong, of {results.facts['device']}")
    return 0


def why_not(results: Results) -> str | None:
    """Why a result says nothing of a device; None where it does."""
    if results.stage != "masks":
        return f"it is of stage {results.stage}"
    if results.facts.get("stand_in"):
        return "it is of stand-ins"
    return None if "compute capability" in results.facts else "its device has no compute capability"


def seen_in(results: Results) -> list[Seen]:
    """One wrong row is enough for wrong; right is what all cases of a kind were at all lengths, with none missing."""
    facts = results.facts
    where = ".".join(facts["torch"].split(".")[:2]), facts["compute capability"]
    when = facts["date"][:10], facts["device"]
    found = []
    for kernel, dtype, kind in sorted({(row["kernel"], row["dtype"], row["kind"]) for row in _rows(results)}):
        for table, backends in BACKENDS.items():
            of_kind = [
                row
                for row in results.tables.get(table, [])
                if (row["kernel"], row["dtype"]) == (kernel, dtype) and row["case"] in _cases(results, kernel, kind)
            ]
            planned = len(_cases(results, kernel, kind)) * int(facts["lengths of masks"])
            for backend in backends:
                right = _verdict([row.get(backend, row.get("outcome", "")) for row in of_kind], planned)
                if right is not None and kind != "none":
                    found.append(Seen(kernel, where[0], where[1], backend, kind, dtype, right, *when))
    return found


def _rows(results: Results) -> Iterable[Row]:
    return (row for rows in results.tables.values() for row in rows if "kind" in row)


def _cases(results: Results, kernel: str, kind: str) -> set[str]:
    """The cases that are of a kind at any length: a row whose process ended does not say its own."""
    return {row["case"] for row in _rows(results) if (row["kernel"], row["kind"]) == (kernel, kind)} & CASES.keys()


def _verdict(outcomes: list[str], planned: int) -> bool | None:
    """None where something was not run, or not done."""
    if any(outcome.startswith(BAD) for outcome in outcomes):
        return False
    if len(outcomes) < planned or any(outcome.startswith(CANNOT) for outcome in outcomes):
        return None
    return all(outcome == RIGHT for outcome in outcomes)


def merged(old: Iterable[Seen], new: Iterable[Seen]) -> list[Seen]:
    """What is new takes the place of what was seen before of the same."""
    by_key = {(*seen[:6],): seen for seen in (*old, *new)}
    return sorted(by_key.values())


def text(seen: Iterable[Seen], before: str) -> str:
    """The module with another table."""
    lines = "".join(f"    Seen({', '.join(map(_literal, one))}),\n" for one in seen)
    return f"{before.split(_MARK)[0]}{_MARK}\n{lines})\n"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
