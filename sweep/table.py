"""The tables of docs/models.md from the results of a sweep."""

from collections import Counter, defaultdict
from pathlib import Path

from sp_attention.cli.reduced import TASKS
from sp_attention.cli.reduced.sizes import BEYOND
from sp_attention.cli.tables import markdown_table
from sweep.running import Record, key, read

HEADINGS = ("type", "result", "kernel", "tokens", "largest error", "remarks")
INTRODUCTION = f"""\
Written by `python -m sweep`. Every type is run with sequences of 33 tokens, and of {BEYOND}: there the numbers of
tokens beyond which a type does otherwise than below, those named in the column "tokens", are set to less. Windows and
chunks of attention are shorter than either. The result is the worst of all lengths and numbers of ranks."""
OUTCOMES = ("exact", "partly refused", "refused", "not buildable", "not comparable", "silently wrong", "other errors")


def latest(results: Path) -> dict[tuple[str, str, int, int], Record]:
    """The last result of every mapping, type, number of ranks and of tokens."""
    return {key(record): record for record in read(results)}


def outcome(record: Record) -> str:
    """Which of `OUTCOMES` a type has: the worst of its batches."""
    if "not_buildable" in record:
        return "not buildable"
    if "crashed" in record or "failed" in record:
        return "other errors"
    if record["refused"]:
        return "refused"
    outcomes = Counter(verdict["outcome"] for verdict in record["verdicts"])
    for found, name in (("differs", "silently wrong"), ("failed", "other errors")):
        if outcomes[found]:
            return name
    if outcomes["exact"]:
        return "partly refused" if outcomes["refused"] else "exact"
    return "refused" if outcomes["refused"] else "not comparable"


def reason(record: Record) -> str:
    """Why a type is not exact, or which of its batches are not."""
    for problem in ("not_buildable", "failed", "refused"):
        if record.get(problem):
            return str(record[problem])
    if "crashed" in record:
        return "a rank hangs or dies: " + str(record["crashed"]).strip().rsplit("\n", 1)[-1]
    parts = ["compared in float32"] if record["dtype"] == "float32" else []
    for verdict in record["verdicts"]:
        if verdict["outcome"] == "exact":
            continue
        detail = verdict["reason"]
        if verdict["outcome"] == "differs":
            first = verdict["first"] and f"; first in {verdict['first']['module']}"
            detail = f"{verdict['where']} by {verdict['error']:.1e}{first or ''}"
        parts.append(f"{verdict['kind']} {verdict['outcome']}: {detail}")
    return "; ".join(parts)


def how(record: Record) -> str:
    """Which parts run head-parallel or position-wise and which on gathered tokens."""
    parts = record.get("parts", {})
    if "head-parallel" not in parts:
        return next((kind for kind in ("gathered", "position-wise") if kind in parts), "nothing is cut")
    return f"head-parallel; gathered: {', '.join(parts['gathered'])}" if "gathered" in parts else "head-parallel"


def largest(record: Record) -> float | None:
    """The largest relative error of the batches that are exact or differ."""
    return max(
        (verdict["error"] for verdict in record.get("verdicts", []) if verdict["error"] is not None), default=None
    )


def summary(results: Path) -> str:
    """A line for every mapping and number of ranks, and every variant; then what is wrong or fails, and why."""
    counts: dict[tuple[str, int, int], Counter[str]] = defaultdict(Counter)
    varied: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    problems = []
    for (mapping, kind, ranks, length), record in latest(results).items():
        found = outcome(record)
        counts[mapping, ranks, length][found] += 1
        for verdict in record.get("verdicts", []):
            _, with_variant, variant = verdict["kind"].partition(", ")
            if with_variant:
                varied[ranks, variant][verdict["outcome"]] += 1
        if found in ("silently wrong", "other errors"):
            problems.append(f"  {found}: {mapping} {kind} on {ranks}, {length} tokens: {reason(record)[:300]}")
    lines = []
    for (mapping, ranks, length), count in counts.items():
        built = count.total() - count["not buildable"]
        rest = ", ".join(f"{count[name]} {name}" for name in OUTCOMES if name != "not buildable")
        lines.append(f"{mapping} on {ranks} ranks, {length} tokens: {count.total()} types, {built} built: {rest}")
    for (ranks, variant), count in sorted(varied.items()):
        rest = ", ".join(f"{number} {name}" for name, number in count.most_common())
        lines.append(f"with {variant} on {ranks} ranks, batches: {rest}")
    return "\n".join([*lines, *problems])


def write(results: Path, target: Path) -> None:
    """Write a page with one table a mapping."""
    records = latest(results)
    sections = ["# Models", INTRODUCTION, "```text\n" + summary(results) + "\n```"]
    for mapping in TASKS:
        types = sorted({kind for name, kind, _, _ in records if name == mapping})
        if not types:
            continue
        rows = []
        for kind in types:
            found = [record for (name, of, _, _), record in records.items() if (name, of) == (mapping, kind)]
            worst = min(found, key=lambda record: (outcome(record) == "exact", record["ranks"]))
            lengths = sorted({record["length"] for record in found if "not_buildable" not in record})
            beyond = sorted({name for record in found for name in record.get("thresholds", ())})
            result = outcome(worst) + (f", {how(worst)}" if outcome(worst) == "exact" else "")
            error = max((error for record in found if (error := largest(record)) is not None), default=None)
            shown = "" if error is None else f"{error:.0e}"
            tokens = ", ".join(map(str, lengths)) + (f" > {', '.join(beyond)}" if beyond else "")
            rows.append([kind, result, worst.get("kernel", ""), tokens, shown, reason(worst)[:200]])
        sections += [f"## {mapping}", markdown_table(HEADINGS, rows)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n\n".join(sections) + "\n")
