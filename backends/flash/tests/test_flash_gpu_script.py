"""`ci/gpu`, as far as it runs on a machine without an accelerator."""

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sp_attention_flash import backend
from sp_attention_flash.packages import FLASH2

from sp_attention import testing
from sp_attention.launch import run_ranks

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


def llama_on_the_cpu() -> list[Any]:
    sys.path.insert(0, str(SCRIPT.parent))
    import whole_models

    whole_models.TYPES = dict.fromkeys(whole_models.TYPES, ("llama",))
    del whole_models.OPTIONS["checkpointed, offload"]  # which there is on devices only
    found: list[Any] = whole_models._compared("cpu")
    return found


def test_its_whole_models_are_exact_on_the_cpu_and_what_is_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    for found in run_ranks(2, llama_on_the_cpu, timeout=200):
        assert {one.verdict for one in found} == {"exact"}
        assert {one.dtype for one in found} == {"float64", "bfloat16"}
        assert {"plain", "left-padded", "packed", "generate", "logits and MLP in tiles", "checkpointed"} <= {
            one.step for one in found
        }
    assert replace(found[0], error=1e-3).verdict == "**wrong**"
    assert replace(found[0], problem="RuntimeError: no").verdict == "**wrong**: RuntimeError: no"
