"""What tests of trainers and of loops with accelerate use: texts, a collator, a trainer, and what came of a run."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import DistributedType
from models import LLAMA
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, IterableDataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

import sp_attention
from sp_attention.integrations.transformers import sequence_parallel

SIZE = 23


# What a run logs of its own speed.
SPEED = ("runtime", "per_second")


class Texts(Dataset):
    """23 texts of 8 to 32 tokens."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if number >= SIZE:
            raise IndexError(number)  # for those who iterate
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 97, (8 + 7 * number % 25,), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from (Texts()[number] for number in range(SIZE))


class Collator:
    """Pads on the right, and notes what it was given. `noise`: labels are left out at random, by three generators."""

    def __init__(self, noise: bool) -> None:
        self.noise = noise
        self.seen: list[int] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.seen += [int(row["input_ids"].sum()) for row in rows]
        length = max(len(row["input_ids"]) for row in rows)

        def padded(tensors: list[Tensor], value: int) -> Tensor:
            return torch.stack([F.pad(tensor, (0, length - len(tensor)), value=value) for tensor in tensors])

        labels = padded([row["labels"] for row in rows], -100)
        if self.noise:
            draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
            for draw in draws:
                labels[:, int(draw * length)] = -100
        return {
            "input_ids": padded([row["input_ids"] for row in rows], 0),
            "attention_mask": padded([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "labels": labels,
        }


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    right = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {"right": float(right.mean()), "rows": len(prediction.predictions)}


class Stop(TrainerCallback):
    """Ends a run after its third step."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


def trainer(folder: Path, way: dict[str, Any], sp_size: int, callbacks: tuple[TrainerCallback, ...] = ()) -> Trainer:
    options = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "learning_rate": 0.1,
        "max_grad_norm": 0,
        "optim": "sgd",
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "include_num_input_tokens_seen": "all",
        "use_cpu": True,
    } | way
    if sp_size == 1:
        options.pop("fsdp", None)  # Against no engine, or DDP.
    dropout, noise = options.pop("dropout", 0.0), options.pop("noise", False)
    data, loss = options.pop("train_dataset", Texts()), options.pop("compute_loss_func", None)
    model = LLAMA.build(options.pop("dtype", torch.float64))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    trainer_class = Trainer
    if sp_size > 1:
        sp_attention.enable(model, backend="sdpa", sp_size=sp_size)
        trainer_class = sequence_parallel(Trainer)
    with fsdp_on_cpus() if "fsdp" in options else nullcontext():
        return trainer_class(
            model=model,
            args=TrainingArguments(str(folder), logging_steps=1, report_to=[], disable_tqdm=True, seed=3, **options),
            train_dataset=data,
            eval_dataset=Texts(),
            data_collator=Collator(noise),
            compute_metrics=metrics,
            compute_loss_func=loss,
            callbacks=list(callbacks),
        )


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """accelerate has FSDP for GPUs and their like only; torch has it for CPUs too, so these pass for GPUs."""
    prepare = PartialState._prepare_backend

    def passing(*args: Any, **options: Any) -> tuple[str, DistributedType]:
        return prepare(*args, **options)[0], DistributedType.MULTI_GPU

    def set_device(state: PartialState) -> None:
        state.device = torch.device("cpu")

    with patch.multiple(PartialState, _prepare_backend=passing, set_device=set_device):
        yield


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [
        {name: value for name, value in entry.items() if not name.endswith(SPEED)}
        for entry in trainer.state.log_history
    ]


def weights(trainer: Trainer) -> Tensor:
    whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in trainer.model.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in whole])
