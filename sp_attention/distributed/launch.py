"""Start ranks on this machine, wait for all of them, and never hang."""

import faulthandler
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from time import monotonic
from typing import Any

import torch.distributed as dist

from sp_attention.distributed.process_groups import listen_on_this_machine

# How processes start. What has started threads, as most that imported torch have, must not fork.
CONTEXT: SpawnContext | ForkServerContext = get_context("spawn")

# Ranks compute with one thread, which they decide when they import torch; and what they import, before they have the
# module path of their parent, is not looked for in the current folder.
_OF_RANKS = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}

# How long the others may go on when one rank has failed: they may be about to report the same error.
GRACE = 5.0


class RanksError(AssertionError):
    """Some rank failed; the text has a section for every rank: its traceback, its stack when it hung, its exit code."""


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(*args)` on `ranks` new processes with a gloo process group; return each rank's result, in order.

    `function`, its arguments and its results must be picklable. The process group's own timeout is shorter than
    `timeout` (seconds), so that a rank that waits for another in vain says where. Raises RanksError unless every rank
    returns; ranks that are still alive then have shown their stacks and are ended. They end too when this process does,
    by whatever signal. They listen on this machine's own network only, unless GLOO_SOCKET_IFNAME says otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="sp_attention_ranks_") as folder:
        workers: list[Any] = []
        links: list[Connection] = []
        own_path = os.environ.get("PYTHONSAFEPATH")
        try:
            with _environment(_OF_RANKS):
                for rank in range(ranks):
                    mine, theirs = CONTEXT.Pipe()
                    # Not as a daemon, which could not start processes of its own, such as a loader's workers.
                    given = (rank, ranks, folder, theirs, timeout, own_path, function, args)
                    worker = CONTEXT.Process(target=_work, args=given)
                    worker.start()
                    theirs.close()
                    workers.append(worker)
                    links.append(mine)
            return _collect(workers, links, Path(folder), monotonic() + timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within it the environment has these variables, which new processes get."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        _put_back(before)


def _put_back(variables: Mapping[str, str | None]) -> None:
    """Give variables of the environment these values; None for those that were not there."""
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _end_with_parent(folder: str) -> None:
    """End this process, what it has started and the folder, when its parent ends, which a signal may end any time."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        for child in active_children():
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="sp_attention: ends with the parent", daemon=True).start()


def _work(
    rank: int,
    ranks: int,
    folder: str,
    link: Connection,
    timeout: float,
    safe_path: str | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _put_back({"PYTHONSAFEPATH": safe_path})
    _end_with_parent(folder)
    listen_on_this_machine()
    with open(Path(folder, f"stack{rank}"), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        try:
            # A file and not a port, which another process may take.
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=max(timeout * 0.7, 1.0)),
            )
            succeeded, answer = True, pickle.dumps((True, function(*args)))
        except BaseException:
            succeeded, answer = False, pickle.dumps((False, traceback.format_exc()))
        # The parent may end this process as soon as it has the answer: with it what it started, as a loader's workers.
        for child in active_children():
            child.kill()
            child.join()
        link.send_bytes(answer)
        if succeeded:
            # The others may still be in a collective with this rank: wait until the parent has every answer.
            link.poll(None)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: an orderly end could wait for ranks that failed, and torch's threads sometimes abort in it.
        os._exit(0)


def _collect(workers: list[Any], links: list[Connection], folder: Path, deadline: float) -> list[Any]:
    """Each rank's result; RanksError as soon as a failure is certain and the grace for the others is over."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(workers):
        waiting = {links[rank]: rank for rank in range(len(workers)) if rank not in results and rank not in failures}
        ready = wait(list(waiting), timeout=max(0.0, deadline - monotonic()))
        for link in ready:
            rank = waiting[link]  # type: ignore[index]  # wait() returns what it was given
            try:
                succeeded, answer = pickle.loads(links[rank].recv_bytes())
            except EOFError:
                workers[rank].join()
                succeeded, answer = False, f"exited with code {workers[rank].exitcode} and no result"
            (results if succeeded else failures)[rank] = answer
        if failures:
            deadline = min(deadline, monotonic() + GRACE)
        if not ready:
            break
    if len(results) == len(workers):
        return [results[rank] for rank in range(len(workers))]
    sections = []
    for rank, worker in enumerate(workers):
        if rank in results:
            text = "returned"
        elif rank in failures:
            text = failures[rank]
        else:
            text = f"still running; its stack:\n{_stack_of(worker, folder / f'stack{rank}')}"
        sections.append(f"--- rank {rank}: {text.rstrip()}")
    raise RanksError("\n".join(["not every rank returned", *sections]))


def _stack_of(worker: Any, file: Path) -> str:
    """The Python stacks of a living process, which its handler writes to `file` when signalled."""
    if not file.exists():
        return "(none given: it has not come to the function yet)"
    os.kill(worker.pid, signal.SIGUSR1)
    end = monotonic() + 1.0
    while monotonic() < end:
        worker.join(0.1)
        text = file.read_text()
        if text.endswith("\n"):
            return text
    return file.read_text() or "(none given)"
