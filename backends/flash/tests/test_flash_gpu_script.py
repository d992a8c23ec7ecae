"""`ci/gpu`, as far as it runs on a machine without an accelerator."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sp_attention_flash import backend
from sp_attention_flash.packages import FLASH2

from sp_attention import testing

SCRIPT = Path(__file__).parents[3] / "ci" / "gpu"
CPU = torch.device("cpu")


def test_without_an_accelerator_it_says_so_and_fails() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "torch finds no accelerator here" in run.stderr


@pytest.mark.usefixtures("on_the_cpu")
def test_its_table_has_what_is_right_what_is_refused_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(testing, "LONG", {})
    kernel = runpy.run_path(str(SCRIPT))["kernel"]
    lines = kernel(backend("flash2", FLASH2, 0, None), CPU).splitlines()
    assert lines[0] == "| flash2 | float16 | bfloat16 | float32 |"
    assert "| packed documents | yes | yes | yes |" in lines
    assert any(line.startswith("| mask tensor | flash2 takes no mask tensors") for line in lines)
    assert len(lines) == len(testing.FEATURES) + 2

    wrong = replace(backend("flash2", FLASH2, 0, None), attend=lambda request: request.query)
    assert "| causal | **wrong**: output is off by" in kernel(wrong, CPU)
