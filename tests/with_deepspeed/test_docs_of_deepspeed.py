"""The Python of the documents that is about DeepSpeed runs."""

from typing import Any

import deepspeed
import pytest
from documents import model_and_data, outcomes, programs
from zero import config, launched

from sp_attention.launch import run_ranks

PROGRAMS = programs("deepspeed")


def given() -> dict[str, Any]:
    launched()
    return model_and_data() | {"deepspeed": deepspeed, "config": config(1)}


@pytest.mark.parametrize("place", PROGRAMS)
def test_programs_run_on_two_ranks(place: str) -> None:
    """In ranks of its own each, since DeepSpeed keeps what it was given first."""
    for found in run_ranks(2, outcomes, (place,), "deepspeed", given, timeout=200):
        assert found[place][1] == ""
