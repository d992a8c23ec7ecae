"""TRL's names that we rely on and that nobody promises us: docs/private-names.md."""

import inspect
from typing import Any

import pytest
import trl
from private_names import Check, names_of, reads, takes, thing_called


def of_rloo_too(check: Check) -> Check:
    """The same of RLOOTrainer's method of that name."""

    def checked(method: Any) -> None:
        for one in (method, getattr(trl.RLOOTrainer, method.__name__)):
            check(one)

    return checked


def is_called_by(caller: str, *arguments: str) -> Check:
    """With these arguments, by another method of its class."""

    def check(method: Any) -> None:
        takes("self", *arguments)(method)
        kind = trl.GRPOTrainer if "grpo" in method.__module__ else trl.RLOOTrainer
        reads(method.__name__)(getattr(kind, caller))

    return check


def is_read_in_every_epoch(batch_size: int) -> None:
    sampler = thing_called("trl.trainer.utils.RepeatSampler", {})("abcdef", 2, batch_size, shuffle=False)
    sampler.batch_size = 3
    assert list(sampler)[:6] == [0, 0, 1, 1, 2, 2]


def is_told_by_its_name(trainer: type) -> None:
    assert trainer.__name__ == "RLOOTrainer"
    assert "beta" in inspect.signature(trl.RLOOConfig).parameters


MADE = {"trl.trainer.utils.RepeatSampler": lambda: thing_called("trl.trainer.utils.RepeatSampler", {})("ab", 1)}
CHECKS: dict[str, Check] = {
    "trl.GRPOTrainer._calculate_rewards": of_rloo_too(is_called_by("_generate_and_score_completions", "inputs")),
    "trl.GRPOTrainer._generate_and_score_completions": of_rloo_too(is_called_by("_prepare_inputs", "inputs")),
    "trl.GRPOTrainer._generate_single_turn": of_rloo_too(is_called_by("_generate", "prompt_ids")),
    "trl.GRPOTrainer._get_eval_sampler": of_rloo_too(reads("RepeatSampler")),
    "trl.GRPOTrainer._get_train_sampler": of_rloo_too(reads("RepeatSampler")),
    "trl.RLOOTrainer": is_told_by_its_name,
    "trl.trainer.utils.RepeatSampler.batch_size": is_read_in_every_epoch,
}


@pytest.mark.parametrize("name", CHECKS)
def test_is_as_we_use_it(name: str) -> None:
    CHECKS[name](thing_called(name, MADE))


def test_every_name_of_the_table_is_checked() -> None:
    assert sorted(CHECKS) == names_of("trl")
