"""What the benchmarks time of DeepSpeed: the same exchange, and the same gradients as one process."""

import pytest
import torch
from test_bench import gradients

from sp_attention.cli.benchmarks import exchange
from sp_attention.cli.benchmarks.training import ALONE, ALST, DEEPSPEED
from sp_attention.launch import run_ranks


@pytest.mark.parametrize("name", [DEEPSPEED, ALST])
def test_a_training_step_of_deepspeed_is_that_of_one_process(name: str) -> None:
    ((loss, expected),) = run_ranks(1, gradients, ALONE)
    for other, got in run_ranks(2, gradients, name, timeout=300):
        assert other == pytest.approx(loss, rel=1e-5)
        for parameter, grad in expected.items():
            torch.testing.assert_close(got[parameter], grad, rtol=0, atol=1e-5 * grad.abs().max().item())


def measured() -> exchange.Record:
    return exchange.measure(exchange.cases(2, quick=True), 1, lambda done: None)


def test_its_exchange_is_measured() -> None:
    (record, _) = run_ranks(2, measured, timeout=300)
    assert "deepspeed" in record["cases"][0]["seconds"]
