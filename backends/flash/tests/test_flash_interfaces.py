"""What we call the packages with, against their own signatures, and flash-attn-4 compiling it for Hopper."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu
import newer
import pytest
import torch
from sp_attention_flash.packages import FLASH2, FLASH3, FLASH4, Options, Package, call

from sp_attention.kernels.varlen import Pattern, Sequences

HERE = Path(__file__).parent


def flash2() -> tuple[Callable[..., Any], ...]:
    cpu.import_flash2()
    return FLASH2.functions()


def flash4() -> tuple[Callable[..., Any], ...]:
    cpu.import_flash2()  # the two share a namespace, whose first import is flash-attn 2
    return FLASH4.functions()


# FlashAttention 3 cannot be installed without its compiler: its signature is the one written down in the stand-in.
REAL = {FLASH2: flash2, FLASH3: lambda: (newer.flash3_func, newer.flash3_varlen_func), FLASH4: flash4}


@pytest.mark.filterwarnings("ignore")  # those of flash-attn-4's dependencies while they are imported
@pytest.mark.parametrize("package", REAL, ids=lambda package: package.kernel)
def test_the_packages_take_what_we_call_them_with(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = [inspect.signature(function) for function in REAL[package]()]
    taken: list[dict[str, Any]] = []

    def taking(signature: inspect.Signature) -> Callable[..., Any]:
        def function(*tensors: torch.Tensor, **options: Any) -> Any:
            taken.append(dict(signature.bind(*tensors, **options).arguments))
            return tensors[0], None

        return function

    monkeypatch.setattr(Package, "functions", lambda package: tuple(map(taking, signatures)))
    tensors = [torch.empty(1)] * 3
    edges = torch.zeros(2, dtype=torch.int32)
    options = Options(0.3, 2.0, 0.1 if package.dropout else 0.0, torch.ones(4) if package.sinks else None)
    for sequences in (None, Sequences(Pattern(True), None, None, edges, edges, 5, 7)):
        call(package, *tensors, Pattern(True, 7, 0), sequences, options, lse=True)
        call(package, *tensors, Pattern(), sequences, options)
    dense, full, varlen, _ = taken
    assert dense["window_size"] == varlen["window_size"] == (7, 0)
    assert full["window_size"] == (package.unlimited, package.unlimited)
    assert (dense["causal"], full["causal"], dense["softmax_scale"], dense["softcap"]) == (True, False, 0.3, 2.0)
    assert (varlen["max_seqlen_q"], varlen["max_seqlen_k"]) == (5, 7)
    assert ("dropout_p" in dense, "learnable_sink" in dense) == (package.dropout, package.sinks)


def test_flash_attn_4_compiles_what_we_call_it_with_for_hopper() -> None:
    """With its own checks of arguments; forward only, and nothing is computed."""
    where = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "compiled.py")],
        env=os.environ | where,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert "inputs must be float16, bfloat16" in found.pop("float32")
    assert "is not supported on SM90" in found.pop("head size 512")
    assert found == {
        "causal, softcap": [[2, 64, 4, 64], "torch.bfloat16", [2, 4, 64]],
        "window, sinks": [[2, 64, 4, 64], "torch.float16", [2, 4, 64]],
        "window on both sides": [[2, 64, 4, 64], "torch.bfloat16", [2, 4, 64]],
        "sequences, window, sinks": [[128, 4, 64], "torch.bfloat16", [4, 128]],
    }
