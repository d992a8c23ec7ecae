"""PEFT's adapters that count tokens, or hold a number for each: their layers run on whole tensors."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import be_quiet, errors_of, run_once
from models import Tiny
from torch import Tensor, nn

import sp_attention

LLAMA = Tiny("LlamaForCausalLM", {"use_cache": False})
TARGETS = ["q_proj", "v_proj"]
INVOCATION = [7, 8, 9]


def batch() -> dict[str, Tensor]:
    ids = torch.randint(10, LLAMA.build().config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    ids[0, 20:23] = ids[1, 9:12] = torch.tensor(INVOCATION)
    return {"input_ids": ids, "labels": ids}


def activated(_: str) -> nn.Module:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS, r=4, alora_invocation_tokens=INVOCATION, init_lora_weights=False
    )
    torch.manual_seed(0)
    return peft.get_peft_model(LLAMA.build(), config).double()


def mixed(folder: str) -> nn.Module:
    """X-LoRA over two adapters, which it scales by what a first pass of the model gives for each token."""
    torch.manual_seed(0)
    names = {number: str(Path(folder) / number) for number in ("0", "1")}
    for number, name in names.items():
        config, base = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4), LLAMA.build()
        adapted = peft.get_peft_model(base, config)
        torch.manual_seed(int(number))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
        adapted.save_pretrained(name)
    size = LLAMA.build().config.hidden_size
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=size, xlora_depth=2, xlora_size=8, xlora_dropout_p=0.0, adapters=names
    )
    return peft.get_peft_model(LLAMA.build(), config).double().train()


BUILT = {"activated LoRA": activated, "X-LoRA": mixed}


def step(model: nn.Module) -> list[Tensor]:
    output = model(**batch())
    if output.loss.requires_grad:
        output.loss.backward()
    return [output.loss.detach()]


def errors(name: str, folder: str) -> dict[str, float]:
    be_quiet()
    own = Path(folder) / str(torch.distributed.get_rank())
    reference, model = BUILT[name](str(own)), BUILT[name](str(own))
    sp_attention.enable(model, backend="sdpa")
    return errors_of(reference, model, step)


@pytest.mark.parametrize("name", BUILT)
def test_adapters_that_know_of_tokens_get_all_of_them(name: str, tmp_path: Any) -> None:
    for found in run_once(2, errors, name, str(tmp_path), timeout=120):
        assert max(found.values()) < 1e-5, found
