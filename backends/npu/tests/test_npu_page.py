"""docs/npu.md says what the kernel says."""

from dataclasses import replace
from pathlib import Path

import standin  # noqa: F401  # registers the stand-ins
from sp_attention_npu import kernel

from sp_attention import testing
from sp_attention.kernels.request import Request

PAGE = Path(__file__).parents[3] / "docs" / "npu.md"


def answer(request: Request) -> str:
    """What the kernel says in training, in a dtype that it takes."""
    given = {name: getattr(request, name) for name in ("query", "key", "value", "bias", "sinks")}
    trained = {name: None if tensor is None else tensor.float().requires_grad_() for name, tensor in given.items()}
    return kernel.refuses(replace(request, **trained)) or "yes"


def test_the_table_has_the_kernels_answers() -> None:
    rows = [f"| {name} | {answer(build())} |\n" for name, build in testing.FEATURES.items()]
    assert "".join(["|  | `npu` |\n| --- | --- |\n", *rows, "\n"]) in PAGE.read_text()
