"""Stage flash of `ci/gpu`, and stage models with flash-attn, as far as they run on a machine without an accelerator."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gpu_stages import flash, models
from sp_attention_flash import backend
from sp_attention_flash.packages import FLASH2

from sp_attention import testing
from sp_attention.launch import run_ranks

CPU = torch.device("cpu")


@pytest.mark.usefixtures("on_the_cpu")
def test_its_rows_have_what_is_right_what_is_refused_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "LONG", flash.SIZED)
    flash2 = backend("flash2", FLASH2, 0, None)
    row = partial(flash._checked, device=CPU, dtype=torch.bfloat16)
    assert row(flash2, "packed documents") == {"outcome": "right"}
    assert row(flash2, "head size 256, sliding window") == {"outcome": "right"}
    assert row(flash2, "mask tensor")["outcome"].startswith("refused: flash2 takes no mask tensors")
    wrong = replace(flash2, attend=lambda request: request.query)
    assert row(wrong, "causal")["outcome"].startswith("wrong: output is off by")


def llama_on_the_cpu() -> dict[str, Any]:
    return models.compared(models.MODELS["Llama"], torch.bfloat16, CPU)


def test_its_whole_models_are_exact_on_the_cpu() -> None:
    for found in run_ranks(2, llama_on_the_cpu, timeout=200):
        assert {"kernel", *models.STEPS, *models.OPTIONS} == found.keys()
        outcomes = [text for name, (_, text) in found.items() if name != "kernel"]
        assert [text.split(":")[0] for text in outcomes if not text.startswith("refused: ValueError: offload")] == [
            "right"
        ] * (len(outcomes) - 1)
