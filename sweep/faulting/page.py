"""docs/faults.md: what became of the other ranks, by kind of fault and point."""

from collections import Counter, defaultdict
from importlib.metadata import version

from sp_attention.cli.tables import markdown_table
from sweep.faulting.fault import KINDS, POINTS
from sweep.faulting.ranks import SECONDS
from sweep.running import Record

# The last five are the library's faults.
OUTCOMES = ("ended", "not reached", "not named", "late", "no error", "hang", "left behind")
BAD = OUTCOMES[2:]

HEAD = f"""# Faults of one rank

Written by `python -m sweep.faults` (`tox -e faults`): a small model is enabled, trained and generates on 2 or 3 CPU
processes, and one of them raises, dies, stops or is given something else, at a random point. The others must end with
an error within the timeout of their group, {SECONDS} s here, and leave no process, no temporary file and no shared
memory. The error names the faulty rank where the others can know it: a rank that differs has told them what it has,
and a rank that fails in the rehearsal of `enable` has told them so. Of one that is gone or silent only a closed
connection or a timeout is known, of whichever rank they waited for."""


def counts(records: list[Record]) -> str:
    """One line for all."""
    found = Counter(record["outcome"] for record in records)
    longest = max((record["seconds"] or 0.0 for record in records), default=0.0)
    return (
        f"{len(records)} faults: {', '.join(f'{found[name]} {name}' for name in OUTCOMES)}; "
        f"the longest time to an error was {longest:.1f} s"
    )


def told(record: Record) -> str:
    """A fault, what came of it and the command that does it again."""
    lines = [f"{record['outcome']}: {command(record)}"]
    lines += [f"    rank {rank}: {ending}" for rank, ending in record["endings"].items()]
    return "\n".join([*lines, *(f"    left behind: {one}" for one in record["left"])])


def command(record: Record) -> str:
    """What runs a fault."""
    return f"python -m sweep.faults --fault '{record['fault']}'"


def page(records: list[Record], seed: int) -> str:
    """docs/faults.md."""
    by_point: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_point[record["kind"], record["point"]].append(record)
    rows = []
    for kind in KINDS:
        for point in POINTS:
            if some := by_point[kind, point]:
                found = Counter(record["outcome"] for record in some)
                longest = max(record["seconds"] or 0.0 for record in some)
                named = sum(record["named"] for record in some)
                cells = [kind, point, str(len(some)), *(str(found[name] or "") for name in OUTCOMES)]
                rows.append([*cells, str(named or ""), f"{longest:.1f} s"])
    head = ["a rank …", "in", "runs", *OUTCOMES, "named", "longest time to an error"]
    text = [
        HEAD,
        f"Seed {seed}, faults 0 to {len(records) - 1}; torch {version('torch')}, gloo.",
        f"```text\n{counts(records)}\n```",
        markdown_table(head, rows),
    ]
    if bad := [record for record in records if record["outcome"] in BAD]:
        text += ["## What is not as it should be", *(f"```text\n{told(record)[:2000]}\n```" for record in bad)]
    return "\n\n".join(text) + "\n"
