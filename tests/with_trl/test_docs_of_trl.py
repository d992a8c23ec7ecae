"""The Python of the documents that is about TRL and PEFT runs."""

import tempfile
from typing import Any

import pytest
from datasets import Dataset
from documents import model_and_data, outcomes, programs
from helpers import Selected, run_once
from peft import LoraConfig, get_peft_model
from texts import TEXTS, tokenizer
from trl import SFTConfig, SFTTrainer

PROGRAMS = programs("trl")


def given() -> dict[str, Any]:
    args = SFTConfig(
        tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    return model_and_data() | {
        "SFTTrainer": SFTTrainer,
        "LoraConfig": LoraConfig,
        "get_peft_model": get_peft_model,
        "tokenizer": tokenizer(),
        "data": Dataset.from_dict({"text": TEXTS}),
        "args": args,
    }


@pytest.mark.parametrize("place", PROGRAMS)
def test_programs_run_on_two_ranks(place: str, selected: Selected) -> None:
    for found in run_once(2, outcomes, selected("place"), "trl", given, timeout=200):
        assert found[place][1] == ""
