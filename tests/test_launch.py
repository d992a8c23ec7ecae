"""`run_ranks` returns, raises with every rank's story, and never hangs."""

import os
import signal
import time
from multiprocessing import get_context
from time import monotonic

import pytest
import torch
import torch.distributed as dist

from sp_attention.launch import RanksError, run_ranks


def rank_and_sum(number: int) -> tuple[int, int, int]:
    total = torch.tensor(number)
    dist.all_reduce(total)
    return dist.get_rank(), int(total), torch.get_num_threads()


def test_every_rank_returns_in_order_and_computes_with_one_thread() -> None:
    assert run_ranks(3, rank_and_sum, 5) == [(0, 15, 1), (1, 15, 1), (2, 15, 1)]
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != ""


def starts_a_process() -> int:
    child = get_context("spawn").Process(target=time.sleep, args=(1000,), daemon=True)
    child.start()
    assert child.pid is not None
    return child.pid


def test_what_a_rank_has_started_ends_with_it() -> None:
    for process in run_ranks(2, starts_a_process):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not want to")
    dist.barrier()


def one_is_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def one_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def one_waits_in_vain() -> None:
    if dist.get_rank() == 1:
        dist.barrier()


def failure(function: object, timeout: float) -> tuple[str, float]:
    start = monotonic()
    with pytest.raises(RanksError) as error:
        run_ranks(2, function, timeout=timeout)
    return str(error.value), monotonic() - start


def test_a_rank_that_raises_is_quoted_with_its_traceback() -> None:
    text, seconds = failure(one_raises, timeout=60)
    assert "--- rank 1: Traceback" in text
    assert "ValueError: rank 1 does not want to" in text
    assert "--- rank 0: " in text
    assert seconds < 30


def test_a_rank_that_is_killed_is_told_by_its_signal() -> None:
    text, seconds = failure(one_is_killed, timeout=60)
    assert "--- rank 1: exited with code -9 and no result" in text
    assert seconds < 30


def test_a_rank_that_sleeps_shows_its_stack() -> None:
    text, seconds = failure(one_sleeps, timeout=8)
    assert "--- rank 0: returned" in text
    assert "--- rank 1: still running; its stack:" in text
    assert "in one_sleeps" in text
    assert seconds < 20


def test_a_rank_that_waits_for_another_in_vain_times_out() -> None:
    text, seconds = failure(one_waits_in_vain, timeout=8)
    assert "one_waits_in_vain" in text
    assert seconds < 20


def returns_a_lambda() -> object:
    return lambda: None


def test_a_result_that_cannot_travel_is_an_error() -> None:
    text, _ = failure(returns_a_lambda, timeout=60)
    assert "pickle" in text


def test_ranks_that_have_not_begun_at_the_deadline_are_told_too() -> None:
    text, seconds = failure(one_sleeps, timeout=0.01)
    assert text.count("still running; its stack:") == 2
    assert seconds < 20
