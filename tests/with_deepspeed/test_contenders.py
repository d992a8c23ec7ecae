"""What the benchmarks time of DeepSpeed: the same exchange, and the same gradients as one process."""

import pytest
from contenders import require_step_of_one_process

from sp_attention.cli.benchmarks import exchange
from sp_attention.cli.benchmarks.training import ALST, DEEPSPEED
from sp_attention.launch import run_ranks


@pytest.mark.parametrize("name", [DEEPSPEED, ALST])
def test_a_training_step_of_deepspeed_is_that_of_one_process(name: str) -> None:
    require_step_of_one_process(name)


def measured() -> exchange.Record:
    return exchange.measure(exchange.cases(2, quick=True), 1, lambda done: None)


def test_its_exchange_is_measured() -> None:
    (record, _) = run_ranks(2, measured, timeout=300)
    assert "deepspeed" in record["cases"][0]["seconds"]
