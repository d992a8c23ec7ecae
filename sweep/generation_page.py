"""docs/generation-models.md, from the results of a sweep of generation."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from sp_attention.cli.outcomes import DIFFERS, EXACT, NOT_COMPARABLE
from sp_attention.cli.tables import markdown_table
from sweep.generating import LENGTH, MODES, NAMED, NEW, OF_EVERY_TYPE
from sweep.running import Record
from sweep.table import largest, latest, outcome, reason, summary

HEAD = f"""# Generation, model by model

Written by `python -m sweep.generation`: `generate()` of small models with random weights in float64, in one process and
on several ranks, {NEW} new tokens after prompts of {LENGTH}, two rows. Exact means that every token is that of one
process, and every score of every candidate, which `generate()` hands out in float32, within a relative difference of
1e-5, or the model's own rounding where it computes in lower precision. A rank's cache is the largest of any rank,
relative to that of one process; of layers that hold heads it may be a share of one in so many ranks, and one head more.
"""


def page(results: Path) -> str:
    """docs/generation-models.md."""
    records = latest(results)
    text = [HEAD.rstrip(), "```text\n" + summary(results) + "\n```", "## Modes", *_modes(records), "## Every type"]
    for mapping in NAMED:
        # Of the types that were compared in more ways only those that all were compared in.
        found = {
            kind: record | {"verdicts": [one for one in record.get("verdicts", []) if one["kind"] in OF_EVERY_TYPE]}
            for (of, kind, ranks, _), record in sorted(records.items())
            if of == mapping and ranks == 2
        }
        if found:
            text += [f"### {mapping}", *_types(found)]
    return "\n\n".join(text) + "\n"


def _modes(records: dict[tuple[str, str, int, int], Record]) -> Iterator[str]:
    """The table of the named models, and why cells have no number."""
    yield (
        "The largest relative difference of a score; tokens are equal wherever there is one. A dash: the model does "
        "not generate so in one process either."
    )
    rows = []
    remarks: dict[str, list[str]] = defaultdict(list)
    for mapping, kinds in NAMED.items():
        for (of, kind, ranks, _), record in sorted(records.items(), key=lambda item: item[0][2]):
            if of != mapping or kind not in kinds:
                continue
            verdicts = {verdict["kind"]: verdict for verdict in record.get("verdicts", [])}
            cells = [_cell(verdicts[mode]) if mode in verdicts else "" for mode in MODES]
            rows.append([kind, str(ranks), *cells, _number(record, "share"), _number(record, "allowed")])
            for remark in remarks_of(record):
                remarks[remark].append(f"{kind} on {ranks}")
    rows.sort(key=lambda row: [*chain(*NAMED.values())].index(row[0]))
    yield markdown_table(["model", "ranks", *MODES, "a rank's cache", "at most"], rows)
    yield "\n".join(f"- {', '.join(kinds)}: {text}" for text, kinds in remarks.items())


def _cell(verdict: Record) -> str:
    if verdict["outcome"] == EXACT:
        return f"{verdict['error']:.0e}" if verdict["error"] else "0"
    return "-" if verdict["outcome"] == NOT_COMPARABLE else f"**{verdict['outcome']}**"


def _types(found: dict[str, Record]) -> Iterator[str]:
    """A row for all types that are exact and cache alike; then what became of the others, each."""
    groups: dict[str, list[str]] = defaultdict(list)
    others = []
    for kind, record in found.items():
        if outcome(record) == "exact":
            groups[record["caches"]].append(kind)
        if outcome(record) != "not buildable":
            others += [[kind, text] for text in remarks_of(record)]
    rows = []
    for caches, kinds in sorted(groups.items(), key=lambda group: -len(group[1])):
        errors = [error for kind in kinds if (error := largest(found[kind])) is not None]
        shares = sorted({_number(found[kind], "share") for kind in kinds} - {""})
        span = " to ".join(dict.fromkeys((shares[0], shares[-1]))) if shares else ""
        error = max(errors, default=0.0)
        rows.append([caches, f"{error:.0e}" if error else "0", span, str(len(kinds)), ", ".join(kinds)])
    yield markdown_table(["exact, with key/value caches that", "largest error", "a rank's cache", "", "types"], rows)
    if others:
        yield markdown_table(["the others", ""], others)
    if missing := [kind for kind, record in found.items() if outcome(record) == "not buildable"]:
        yield f"Not built, or not for prompts of {LENGTH}: {', '.join(missing)}."


def remarks_of(record: Record) -> list[str]:
    """What is not exact, and why; modes of which there is the same to say together."""
    if not record.get("verdicts"):
        return [_short(f"{outcome(record)}: {reason(record)}")]
    modes: dict[str, list[str]] = defaultdict(list)
    for verdict in record["verdicts"]:
        if verdict["outcome"] == DIFFERS:
            modes[f"differs: {verdict['where']} by {verdict['error']:.1e}"].append(verdict["kind"])
        elif verdict["outcome"] != EXACT:
            told = "" if verdict["outcome"] == NOT_COMPARABLE else f"{verdict['outcome']}: "
            modes[told + verdict["reason"]].append(verdict["kind"])
    remarks = [_short(f"{', '.join(kinds)} {text}") for text, kinds in modes.items()]
    if is_too_large(record):
        remarks.append(f"a rank's cache is {record['share']:.2f}, and should be at most {record['allowed']:.2f}")
    return remarks


def is_too_large(record: Record) -> bool:
    """Whether a rank's cache is larger than its share, and a head."""
    return record.get("share") is not None and record["share"] > record["allowed"] + 1e-9


def _number(record: Record, name: str) -> str:
    return "" if record.get(name) is None else f"{record[name]:.2f}"


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
