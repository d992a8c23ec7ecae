"""Faults of one rank, and what becomes of the others: `python -m sweep.faults --seed 1 --table docs/faults.md`."""

import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import click

from sp_attention.distributed import launch
from sp_attention.launch import RanksError, run_ranks
from sweep.faulting.fault import Fault, drawn, fault_of
from sweep.faulting.page import BAD, counts, page, told
from sweep.faulting.ranks import FIRED, SECONDS, work
from sweep.running import Record, append, read, start_quickly

# How much later than the group's timeout an error may come, on a busy machine; how long a run may take in all.
LATER, SECONDS_IN_ALL = 6, 150


def run(fault: Fault) -> Record:
    """The record of a fault on ranks, and with folders, of its own."""
    shared = _shared_memory()
    with tempfile.TemporaryDirectory(prefix="sp_attention_faults_") as name:
        folder, temporary = Path(name), Path(name, "temporary")
        temporary.mkdir()
        with (
            patch.object(tempfile, "tempdir", str(temporary)),
            # Ranks that wait are to be ended by their group's timeout, and not before by the launch.
            patch.object(launch, "GRACE", SECONDS + LATER + 1),
            _stopped_rank_ends(fault, folder),
            suppress(RanksError),
        ):
            run_ranks(fault.ranks, work, fault, folder, temporary, timeout=SECONDS_IN_ALL)
        left = [f"process {one}" for one in _processes({int(file.read_text()) for file in folder.glob("*.pid")})]
        left += [f"file {one.relative_to(temporary)}" for one in temporary.rglob("*")]
        left += [f"shared memory {one}" for one in _left_in_memory(shared)]
        return record_of(fault, _read(folder / FIRED), _endings(fault, folder), left)


def record_of(fault: Fault, fired: Record | None, endings: dict[int, Record | None], left: list[str]) -> Record:
    """fired: when the fault happened, None if never. endings: of the other ranks, None of those that did not end."""
    ended = [ending for ending in endings.values() if ending is not None]
    seconds = max((ending["at"] - fired["at"] for ending in ended), default=None) if fired else None
    named = bool(ended) and all(re.search(rf"\brank {fault.rank}\b", ending["text"]) for ending in ended)
    if fired is None:
        outcome = "not reached"
    elif left:
        outcome = "left behind"
    elif len(ended) < len(endings):
        outcome = "hang"
    elif not all(ending["error"] for ending in ended):
        outcome = "no error"
    elif seconds is not None and seconds > SECONDS + LATER:
        outcome = "late"
    else:
        outcome = "not named" if fault.is_told and not named else "ended"
    texts = {
        rank: "did not end" if ending is None else " ".join(f"{ending['error']}: {ending['text']}".split())[:400]
        for rank, ending in endings.items()
    }
    known = {"fault": str(fault), "kind": fault.kind, "point": fault.point, "outcome": outcome, "seconds": seconds}
    return known | {"named": named, "endings": texts, "left": left}


@contextmanager
def _stopped_rank_ends(fault: Fault, folder: Path) -> Iterator[None]:
    """A rank that was stopped is ended once the others have ended."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.2):
            if (fired := _read(folder / FIRED)) and all(_endings(fault, folder).values()):
                with suppress(ProcessLookupError):
                    os.kill(fired["pid"], signal.SIGKILL)
                return

    thread = threading.Thread(target=watch)
    if fault.kind == "stop":
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        if fault.kind == "stop":
            thread.join()


def _endings(fault: Fault, folder: Path) -> dict[int, Record | None]:
    return {rank: _read(folder / f"rank{rank}.json") for rank in range(fault.ranks) if rank != fault.rank}


def _read(file: Path) -> Record | None:
    return json.loads(file.read_text()) if file.exists() else None


def _processes(sessions: set[int]) -> list[str]:
    """Those of sessions, of which every rank begins one for itself and all that it starts."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # Behind the name, which may hold anything: state, parent, group, session.
            if int(file.read_text().rpartition(")")[2].split()[3]) in sessions:
                found.append(file.parent.name)
    return found


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


def _left_in_memory(before: set[str]) -> set[str]:
    """What has come and no living process uses: what others on this machine use meanwhile is theirs."""
    if not (new := _shared_memory() - before):
        return set()
    time.sleep(0.5)
    used = ""
    for file in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            used += file.read_text(errors="replace")
    return {name for name in new & _shared_memory() if name not in used}


@click.command()
@click.option("--runs", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--fault", "text", help="Do this one only: JSON.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("sweep-faults.jsonl"), show_default=True)
@click.option("--table", type=click.Path(path_type=Path), help="Write the page here: docs/faults.md.")
def main(runs: int, seed: int, text: str | None, results: Path, table: Path | None) -> None:
    """Let one rank raise, die, stop or differ, and see how the others end. Faults that have a result are not run."""
    start_quickly("sweep.faulting.ranks")
    if text is not None:
        record = run(fault_of(text))
        click.echo(f"{told(record)}\n    after {record['seconds']} s, {'' if record['named'] else 'not '}named")
        sys.exit(record["outcome"] in BAD)
    faults = [drawn(seed, number) for number in range(runs)]
    for number, fault in enumerate(faults):
        if str(fault) in {record["fault"] for record in read(results)}:
            continue
        append(results, run(fault))
        click.echo(f"{number + 1} of {runs}: {read(results)[-1]['outcome']}: {fault}", err=True)
    by_fault = {record["fault"]: record for record in read(results)}
    records = [by_fault[str(fault)] for fault in faults]
    click.echo(counts(records))
    bad = [record for record in records if record["outcome"] in BAD]
    for record in bad:
        click.echo(told(record))
    if table is not None:
        table.write_text(page(records, seed))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
