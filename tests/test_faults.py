"""What goes wrong in a long run: a rank that dies or stops, a checkpoint that is cut off, a disk that is full."""

import os
import resource
import signal
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import as_launched
from models import LLAMA, batch_of
from torch import Tensor
from trainers import logged, trainer, weights
from transformers import LlamaForCausalLM
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState

import sp_attention
from sp_attention.errors import CheckpointError
from sp_attention.launch import RanksError, run_ranks

pytestmark = pytest.mark.slow

# A checkpoint after every second of eight steps.
OFTEN = {"save_strategy": "steps", "save_steps": 2}
SECONDS_OF_THE_GROUP = 10


def step_until(signal_number: int) -> None:
    """Train; rank 1 gets a signal in its second step."""
    group = dist.new_group(timeout=timedelta(seconds=SECONDS_OF_THE_GROUP))
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa", group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        loss = model(**batch_of("plain", 33)).loss
        if step == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal_number)
        loss.backward()
        sp_attention.average_gradients(model, group)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_when_a_rank_dies_or_stops_the_others_end_with_an_error(name: str) -> None:
    began = monotonic()
    with pytest.raises(RanksError) as error:
        run_ranks(3, step_until, signal.Signals[name].value, timeout=200)
    # The group's own timeout ends them, not that of the launch.
    assert monotonic() - began < 100
    sections = str(error.value).split("--- rank ")[1:]
    assert ("exited with code -9" if name == "SIGKILL" else "still running") in sections[1]
    for rank in (0, 2):
        assert "RuntimeError" in sections[rank] or "DistBackendError" in sections[rank]
        assert "loss.backward()" in sections[rank]


class Killed(TrainerCallback, ExportableState):
    """Ends this process as it is about to write the state of the checkpoint of step 4."""

    def __init__(self) -> None:
        self.step = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self.step = state.global_step

    def state(self) -> dict[str, Any]:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


def train(folder: Path, resume: bool, callbacks: tuple[TrainerCallback, ...] = ()) -> tuple[Tensor, list[Any]]:
    as_launched()
    made = trainer(folder, OFTEN, 2, callbacks)
    made.train(resume_from_checkpoint=resume)
    return weights(made), logged(made)


def train_until_killed(folder: Path) -> None:
    train(folder, False, (Killed(),))


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(tmp_path: Path) -> None:
    with pytest.raises(RanksError, match="exited with code -9"):
        run_ranks(2, train_until_killed, tmp_path / "killed", timeout=120)
    assert (tmp_path / "killed" / "checkpoint-4" / "model.safetensors").exists()
    for (resumed, history), (expected, expected_history) in zip(
        run_ranks(2, train, tmp_path / "killed", True, timeout=120),
        run_ranks(2, train, tmp_path / "whole", False, timeout=120),
        strict=True,
    ):
        torch.testing.assert_close(resumed, expected, rtol=1e-12, atol=1e-12)
        assert len(history) == len(expected_history)


class Full(TrainerCallback):
    """From step 4 on this process cannot write files of more than 1,000 bytes, as if the disk were full."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.global_step == 4 and dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def train_on_a_full_disk(folder: Path) -> dict[str, Any]:
    as_launched()
    made = trainer(folder, OFTEN, 2, (Full(),))
    with pytest.raises(CheckpointError) as error:
        made.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = weights(made)
    made.save_model(str(folder / "elsewhere"))
    made.pop_callback(Full)
    made.train(resume_from_checkpoint=True)
    return {"error": str(error.value), "after": after, "end": weights(made)}


def test_a_full_disk_is_an_error_on_every_rank_and_changes_nothing_in_memory(tmp_path: Path) -> None:
    found = run_ranks(2, train_on_a_full_disk, tmp_path / "full", timeout=160)
    assert found[0]["error"] == found[1]["error"]
    assert found[0]["error"].startswith("rank 0 could not write checkpoint-4: ")
    assert found[0]["error"].endswith("takes the last checkpoint that is whole")
    whole = run_ranks(2, train, tmp_path / "whole", False, timeout=120)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for each, (end, _) in zip(found, whole, strict=True):
        torch.testing.assert_close(each["after"], after, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each["end"], end, rtol=1e-12, atol=1e-12)
