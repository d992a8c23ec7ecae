"""enable() inside of what a program may have around it: autocast, inference mode, no gradients, other defaults."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from helpers import errors_of, loss_step, relative_error, too_large
from models import LLAMA, batch_of

import sp_attention
from sp_attention.launch import run_ranks


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": default_dtype,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}


def enabled_within() -> dict[str, Any]:
    """By what is around enable(), what it reports, and the errors of a step outside of it."""
    found = {}
    for name, around in AROUND.items():
        reference, model = LLAMA.build(), LLAMA.build()
        with around():
            handle = sp_attention.enable(model, backend="sdpa")
        found[name] = (handle.report(), errors_of(reference, model, loss_step))
    return found


def made_in_inference_mode() -> float:
    """The error of logits of a model that was made where nothing learns."""
    with torch.inference_mode():
        reference, model = LLAMA.build().eval(), LLAMA.build().eval()
        sp_attention.enable(model, backend="sdpa")
        ids = batch_of("plain", 33)["input_ids"]
        return relative_error(model(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_what_is_around_enable_is_not_around_the_rehearsal() -> None:
    for found in run_ranks(2, enabled_within):
        reports = {report for report, _ in found.values()}
        assert len(reports) == 1
        for _, errors in found.values():
            assert not too_large(errors)


def test_a_model_that_was_made_in_inference_mode_is_proven_in_it() -> None:
    assert max(run_ranks(2, made_in_inference_mode)) < 1e-5
