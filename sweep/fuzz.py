"""Random cases against one process: `python -m sweep.fuzz --cases 1000 --seed 1 --table docs/fuzz.md`.

A case that is wrong, or hangs, or in which ranks part, is shrunk and printed with the command that runs it again.
"""

import os
import sys
import tempfile
import warnings
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from time import monotonic

import click

from sp_attention.launch import RanksError, run_ranks
from sweep.fuzzing.case import Case, case_in, case_of, drawn, shrunk
from sweep.fuzzing.page import counts, faults, latest, page, told
from sweep.running import Record, append, read, start_quickly

# A rank that hangs costs a chunk's time; then the chunk's cases are run one at a time.
CHUNK, SECONDS_TO_START = 10, 30


def run_cases(cases: list[Case], results: Path, seconds: float) -> None:
    """Run cases and append the record of each to a file. seconds: what one may take, on average."""
    by_ranks: dict[int, list[Case]] = defaultdict(list)
    for case in cases:
        by_ranks[case.ranks].append(case)
    for some in by_ranks.values():
        for first in range(0, len(some), CHUNK):
            _run(some[first : first + CHUNK], results, seconds)


def _run(cases: list[Case], results: Path, seconds: float) -> None:
    """A chunk of cases on the same ranks; on ranks of its own the one that ends them, or in which they hang."""
    while cases:
        before = results.stat().st_size if results.exists() else 0
        began, problem = monotonic(), ""
        try:
            timeout = SECONDS_TO_START + seconds * len(cases)
            run_ranks(cases[0].ranks, run_chunk, cases, results, timeout=timeout)
        except RanksError as error:
            problem = str(error)
        done = len(read(results, before))
        if problem and done < len(cases):
            if len(cases) == 1:
                append(results, _ended(cases[0], problem, monotonic() - began))
            else:
                _run(cases[done : done + 1], results, seconds)
            done += 1
        cases = cases[done:]


def _ended(case: Case, problem: str, took: float) -> Record:
    """The record of a case whose ranks did not all come back."""
    is_waiting = "still running" in problem or "imed out" in problem
    return {
        "case": asdict(case),
        "outcome": "hang" if is_waiting else "other error",
        "calls": [{"call": "", "outcome": "", "error": None, "reason": problem[-6000:]}],
        "seconds": round(took, 1),
    }


def run_chunk(cases: list[Case], results: Path) -> None:
    """On every rank: one case after the other; rank 0 writes."""
    import torch.distributed as dist
    import transformers

    from sweep.fuzzing.running import run

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    apart = dist.new_group()
    for case in cases:
        record = run(case, apart)
        if dist.get_rank() == 0:
            append(results, record)
        dist.barrier(group=apart)


def ran(case: Case, seconds: float) -> Record:
    """The record of a case that runs by itself."""
    with tempfile.TemporaryDirectory(prefix="sp_attention_fuzz_") as folder:
        results = Path(folder, "results.jsonl")
        _run([case], results, seconds)
        return read(results)[0]


def simplified(record: Record, seconds: float, tries: int) -> Record:
    """The record of a fault with the simplest case found that shows the same one, as JSON, in `shrunk`."""
    case = case_in(record)

    def is_faulty(other: Case) -> bool:
        return bool(ran(other, seconds)["outcome"] == record["outcome"])

    if not is_faulty(case):
        return record | {"shrunk": "", "remark": "not by itself, only after other cases on the same ranks"}
    return record | {"shrunk": str(shrunk(case, is_faulty, tries))}


@click.command()
@click.option("--cases", "count", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="The number of the first case.")
@click.option("--seed", default=1, show_default=True)
@click.option("--case", "text", help="Run this case only: JSON of what is not simple of it.")
@click.option("--seconds", default=15.0, show_default=True, help="What a case may take, on average.")
@click.option("--tries", default=30, show_default=True, help="Runs for shrinking a fault; 0 for none.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("sweep-fuzz.jsonl"), show_default=True)
@click.option("--table", type=click.Path(path_type=Path), help="Write the page here: docs/fuzz.md.")
def main(
    count: int, first: int, seed: int, text: str | None, seconds: float, tries: int, results: Path, table: Path | None
) -> None:
    """Compare random cases on several ranks with one process. Cases that the results have already are not run."""
    start_quickly("sweep.fuzzing.running")
    if text is not None:
        record = ran(case_of(text), 4 * seconds)
        click.echo(told(record))
        sys.exit(bool(faults([record])))
    cases = [drawn(seed, number) for number in range(first, first + count)]
    done = {str(case_in(record)) for record in read(results)}
    left = [case for case in cases if str(case) not in done]
    for start in range(0, len(left), 10 * CHUNK):
        click.echo(f"{len(left) - start} of {count} cases left", err=True)
        run_cases(left[start : start + 10 * CHUNK], results, seconds)
    for record in faults(latest(results, cases)):
        if tries and "shrunk" not in record:
            append(results, simplified(record, 4 * seconds, tries))
    records = latest(results, cases)
    click.echo(counts(records))
    for record in faults(records):
        click.echo(told(record))
    if table is not None:
        table.write_text(page(records, seed, first))
    sys.exit(bool(faults(records)))


if __name__ == "__main__":
    main()
