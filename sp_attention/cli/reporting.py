"""Run ranks and hear of their progress."""

import threading
from collections.abc import Callable
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

Report = Callable[[int], None]


def run_reporting(ranks: int, function: Callable[..., Any], *args: Any, report: Report, timeout: float) -> list[Any]:
    """The results of `function(*args, report)` on new ranks, of which rank 0's report is heard here while they run.

    Raises ClickException with every rank's section unless all ranks return.
    """
    from sp_attention.launch import RanksError, run_ranks

    numbers: SimpleQueue[int | None] = get_context("spawn").SimpleQueue()

    def listen() -> None:
        for number in iter(numbers.get, None):
            report(number)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        return run_ranks(ranks, _call, function, args, numbers, timeout=timeout)
    except RanksError as error:
        raise click.ClickException(str(error)) from error
    finally:
        numbers.put(None)
        listener.join()


def _call(function: Callable[..., Any], args: tuple[Any, ...], numbers: "SimpleQueue[int | None]") -> Any:
    import torch.distributed as dist

    return function(*args, numbers.put if dist.get_rank() == 0 else lambda number: None)
