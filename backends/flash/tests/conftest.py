"""The stand-ins in the folder beside this file, and flash-attn's own Python over them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "stand_in"))
# Tiny models are those of the library's own tests; the stages are those of ci/gpu.
sys.path += [str(Path(__file__).parents[3] / "tests"), str(Path(__file__).parents[3] / "ci")]

import cpu
from sp_attention_flash import refusing


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's own Python and operators on CPU tensors, over the stand-in extension; float32 is accepted."""
    import flash_attn_2_cuda

    cpu.import_flash2()
    monkeypatch.setattr(refusing, "DEVICE", "cpu")
    monkeypatch.setattr(refusing, "DTYPES", (*refusing.DTYPES, torch.float32))
    monkeypatch.setattr(flash_attn_2_cuda, "DTYPES", [*flash_attn_2_cuda.DTYPES, torch.float32])
