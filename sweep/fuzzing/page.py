"""docs/fuzz.md: what came of random cases, by model and by call."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sp_attention.cli.tables import markdown_table
from sweep.fuzzing.case import Case, case_in
from sweep.running import Record, read

# What comes of a case: the worst of its calls, the last one here. From "wrong" on they are faults.
OUTCOMES = ("exact", "ranks alike", "not comparable", "refused", "wrong", "ranks disagree", "hang", "other error")
FAULTS = OUTCOMES[4:]

HEAD = """# Random cases

Written by `python -m sweep.fuzz` (`tox -e fuzz`): random models, masks, lengths, labels, heads, ranks, groups, dtypes,
options of `enable`, adapters and orders of calls, on several CPU processes and in one. Exact means that loss, whole
logits, hidden states, tokens, scores and **every** parameter's gradient of every call are those of one process, within
a relative difference of 1e-5 (1e-3 in float32), or the model's own rounding where it computes in lower precision. Of
training that draws random numbers only that all ranks have the same is asked: "ranks alike". Refused is the same error
of the library on every rank; "not comparable": one process cannot do it either. A case is the worst of its calls; after
options that are refused it goes on without options."""


def latest(results: Path, cases: Iterable[Case]) -> list[Record]:
    """The last record of each of these cases, in their order; those that have none are left out."""
    records = {str(case_in(record)): record for record in read(results)}
    return [records[str(case)] for case in cases if str(case) in records]


def faults(records: list[Record]) -> list[Record]:
    """Those that are neither exact nor refused."""
    return [record for record in records if record["outcome"] in FAULTS]


def counts(records: list[Record]) -> str:
    """One line for all."""
    found = Counter(record["outcome"] for record in records)
    longest = max((record["seconds"] for record in records), default=0.0)
    return (
        f"{len(records)} cases, {sum(len(record['calls']) - 1 for record in records)} calls: "
        f"{', '.join(f'{found[name]} {name}' for name in OUTCOMES)}; the longest took {longest:.0f} s"
    )


def told(record: Record) -> str:
    """A case and what came of it: the command that runs it again, and all of its calls."""
    lines = [f"{record['outcome']}: {command(str(case_in(record)))}"]
    if record.get("shrunk"):
        lines.append(f"  simpler: {command(record['shrunk'])}")
    for called in record["calls"]:
        error = "" if called["error"] is None else f" {called['error']:.1e}"
        lines.append(f"    {called['call']}: {called['outcome']}{error} {called['reason']}".rstrip())
    return "\n".join(lines)


def command(case: str) -> str:
    """What runs a case."""
    return f"python -m sweep.fuzz --case '{case}'"


def page(records: list[Record], seed: int, first: int) -> str:
    """docs/fuzz.md."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft"))
    text = [
        HEAD,
        f"Seed {seed}, cases {first} to {first + len(records) - 1}; {packages}.",
        f"```text\n{counts(records)}\n```",
        "## By model",
        _table("model", ((case_in(record).model, record["outcome"]) for record in records)),
        "## By call",
        _table("call", ((one["call"], one["outcome"]) for record in records for one in record["calls"])),
        "## Refused",
        _reasons(records, "refused"),
        "## Not comparable",
        _reasons(records, "not comparable"),
    ]
    if found := faults(records):
        text += ["## Faults", *(f"```text\n{told(record)[:2000]}\n```" for record in found)]
    return "\n\n".join(part for part in text if part) + "\n"


def _table(name: str, outcomes: Iterable[tuple[str, str]]) -> str:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for key, outcome in outcomes:
        found[key][outcome] += 1
    rows = [[key, *(str(count[one] or "") for one in OUTCOMES)] for key, count in sorted(found.items())]
    return markdown_table([name, *OUTCOMES], rows)


def _reasons(records: list[Record], outcome: str) -> str:
    """Reasons that differ in numbers or names of modules only are one."""
    found: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for one in record["calls"]:
            if one["outcome"] == outcome:
                reason = re.sub(r"\d+", "N", " ".join(one["reason"].split()))[:100]
                found[reason].append(f"{case_in(record).model}: {one['reason'][:300]}")
    rows = [[str(len(texts)), texts[0]] for texts in sorted(found.values(), key=len, reverse=True)]
    return markdown_table(["calls", "the first"], rows) if rows else "None."


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
