"""Runs types in chunks, each on ranks of its own, so that a type that crashes or hangs costs only itself."""

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from time import monotonic
from typing import Any

import click
from transformers import PreTrainedModel

from sp_attention.cli.comparison import Batch, compare
from sp_attention.cli.reduced import NotBuildableError, prepare, types_of
from sp_attention.cli.reduced.configuration import configurations
from sp_attention.cli.reduced.sizes import BEYOND, THRESHOLDS
from sp_attention.distributed import launch
from sp_attention.launch import RanksError, run_ranks

# A rank that hangs costs most of a chunk's time: small chunks, though every one starts its ranks anew.
CHUNK, SECONDS_TO_START, SECONDS_TO_BUILD = 8, 30, 20
Record = dict[str, Any]
# On every rank: what comes of a model and batches for it, by kind.
Compared = Callable[[PreTrainedModel, dict[str, Batch]], Record]


def sweep(
    mapping: str,
    only: set[str],
    ranks: int,
    length: int,
    results: Path,
    compared: Compared,
    seconds: float,
    again: bool = False,
) -> None:
    """Run the types of a mapping that have no result yet, and append a line of JSON for each to `results`.

    only: some of the types, all where it is empty. seconds: what a type may take, on average.
    """
    types = [kind for kind in types_of(mapping) if not only or kind in only]
    if not again:
        done = {key(record) for record in read(results)}
        types = [kind for kind in types if (mapping, kind, ranks, length) not in done]
    began = monotonic()
    while types:
        chunk = types[:CHUNK]
        before = results.stat().st_size if results.exists() else 0
        problem = ""
        try:
            timeout = SECONDS_TO_START + seconds * len(chunk)
            run_ranks(ranks, _run_chunk, mapping, chunk, length, results, compared, timeout=timeout)
        except RanksError as error:
            problem = str(error)
        finished = [record["type"] for record in read(results, before)]
        unfinished = [kind for kind in chunk if kind not in finished]
        if problem and unfinished:
            finished.append(unfinished[0])
            record = {"type": unfinished[0], "mapping": mapping, "ranks": ranks, "length": length}
            append(results, record | {"crashed": problem[-3000:]})
        types = [kind for kind in types if kind not in finished]
        click.echo(
            f"{mapping}, {ranks} ranks, {length} tokens: {len(types)} left, {monotonic() - began:.0f} s", err=True
        )


def start_quickly(*modules: str) -> None:
    """Let ranks start as forks of a process that has imported these, and done nothing else."""
    os.environ["OMP_NUM_THREADS"] = "1"  # As `run_ranks` has it, when torch is imported.
    context = get_context("forkserver")
    context.set_forkserver_preload(["sp_attention.api", "transformers.models.llama.modeling_llama", *modules])
    launch.CONTEXT = context
    ensure_running()


def key(record: Record) -> tuple[str, str, int, int]:
    """The mapping, type, number of ranks and of tokens of a record."""
    return record["mapping"], record["type"], record["ranks"], record["length"]


def read(results: Path, start: int = 0) -> list[Record]:
    """The records of a file of results, in the order in which they were written."""
    if not results.exists():
        return []
    with results.open() as file:
        file.seek(start)
        return [json.loads(line) for line in file]


def append(results: Path, record: Record) -> None:
    """Write a record behind the others of a file of results."""
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")


def trained(model: PreTrainedModel, batches: dict[str, Batch], variants: tuple[str, ...]) -> Record:
    """Training steps of the model on all ranks, beside those of one process."""
    return asdict(compare(model, batches, "auto", variants))


def _run_chunk(mapping: str, types: list[str], length: int, results: Path, compared: Compared) -> None:
    """On every rank: one type after the other; rank 0 writes."""
    import torch.distributed as dist
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for kind in types:
        began = monotonic()
        record = {"type": kind, "mapping": mapping, "ranks": dist.get_world_size(), "length": length}
        record |= _run(mapping, kind, length, compared)
        if dist.get_rank() == 0:
            append(results, record | {"seconds": round(monotonic() - began, 1)})
        dist.barrier()


def _run(mapping: str, kind: str, length: int, compared: Compared) -> Record:
    thresholds = THRESHOLDS if length >= BEYOND else {}
    try:
        with _no_longer_than(SECONDS_TO_BUILD):
            model, batches = prepare(kind, mapping, length, thresholds)
    except (NotBuildableError, TimeoutError) as error:
        return {"not_buildable": str(error)}
    try:
        found = compared(model, batches)
    except Exception as error:  # of `enable`, which should have refused
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    of_model = {"parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}
    known = {name for config in configurations(model.config) for name in vars(config)}
    return of_model | {"thresholds": sorted(known & thresholds.keys())} | found


@contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds} s to build")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
