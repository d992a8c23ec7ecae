"""transformers' Trainer: everything that a run logs, and its weights, against as many processes as there are groups."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from models import MODELS
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, IterableDataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

import sp_attention
from sp_attention.integrations.accelerate import require_fit
from sp_attention.integrations.transformers import sequence_parallel
from sp_attention.launch import run_ranks

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


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A loss of the user's, on whole logits."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum())


WAYS: dict[str, dict[str, Any]] = {
    "plain": {"include_num_input_tokens_seen": "non_padding"},
    "clipped, smoothed": {"max_grad_norm": 0.5, "label_smoothing_factor": 0.1},
    "own loss": {"compute_loss_func": summed_loss},
    "loss by process": {"average_tokens_across_devices": False, "dataloader_drop_last": True},
    # On several processes accelerate would read it on one of them, and take no batches that differ in length.
    "stream": {"train_dataset": Stream(), "max_steps": 5, "accelerator_config": {"dispatch_batches": False}},
    "workers": {"dataloader_num_workers": 2, "noise": True},
    "noise": {"noise": True, "data_seed": 5},
    "group by length": {"train_sampling_strategy": "group_by_length"},
    "rebalanced": {"train_sampling_strategy": "batch_rebalance"},
    "checkpointing": {"gradient_checkpointing": True},
    "best model": {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
    "dropout": {"dropout": 0.2, "num_train_epochs": 1},
    "fsdp2": {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        "save_strategy": "epoch",
        "max_grad_norm": 0.5,
    },
}


# For one group, against one process; and for two, where groups get different batches.
WAYS_OF = {1: tuple(WAYS), 2: ("plain", "stream", "workers", "rebalanced", "fsdp2")}


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
    model = MODELS["llama-6q3kv"].build(options.pop("dtype", torch.float64))
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


def as_launched() -> None:
    """What torchrun would have set."""
    os.environ |= {"RANK": f"{dist.get_rank()}", "LOCAL_RANK": f"{dist.get_rank()}"}
    os.environ |= {"WORLD_SIZE": f"{dist.get_world_size()}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def run(folder: Path, sp_size: int, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every way: what was logged, weights and predictions, the texts that this rank was given, lengths in layers."""
    as_launched()
    found = {}
    for name, way in ways.items():
        each = trainer(folder / name, way, sp_size)
        assert each.is_fsdp_enabled == (sp_size > 1 and "fsdp" in way)
        each.train()
        lengths: set[int] = set()
        mlp = each.model.model.layers[0].mlp
        mlp.register_forward_hook(lambda module, args, output, seen=lengths: seen.add(output.shape[1]))
        predicted = each.predict(Texts())
        history = [*logged(each), {k: v for k, v in predicted.metrics.items() if not k.endswith(SPEED)}]
        history.append({"rows in a step": each.get_total_train_batch_size(each.args)})
        numbers = torch.cat([weights(each), torch.from_numpy(predicted.predictions).flatten()])
        found[name] = history, numbers, each.data_collator.seen, max(lengths)
    if "plain" in ways:
        only_loss = trainer(folder / "only loss", {}, sp_size)
        only_loss.compute_metrics = None
        lengths = set()
        only_loss.model.lm_head.register_forward_hook(lambda module, args, output: lengths.add(output.shape[1]))
        loss = only_loss.evaluate(Texts())["eval_loss"]
        found["only loss"] = [{"loss": loss}], weights(only_loss), [], max(lengths)
        first = trainer(folder / "resumed", {"save_strategy": "steps", "save_steps": 100}, sp_size, (Stop(),))
        first.train()
        second = trainer(folder / "resumed", {}, sp_size)
        second.train(resume_from_checkpoint=True)
        found["resumed"] = logged(second), weights(second), [], 0
    return found


@cache
def runs(folder: Path, groups: int, sp_size: int) -> list[dict[str, Any]]:
    ways = {name: WAYS[name] for name in WAYS_OF[groups]}
    return run_ranks(groups * sp_size, run, folder / f"{groups} of {sp_size}", sp_size, ways, timeout=240)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


CASES = [(groups, way) for groups, ways in WAYS_OF.items() for way in (*ways, "only loss", "resumed")]


@pytest.mark.parametrize(("groups", "way"), CASES)
def test_a_run_is_that_of_as_many_processes_as_there_are_groups(folder: Path, groups: int, way: str) -> None:
    plain, sharded = runs(folder, groups, 1), runs(folder, groups, 2)
    for rank, found in enumerate(sharded):
        expected_history, expected_numbers, expected_seen, whole = plain[rank // 2][way]
        history, numbers, seen, part = found[way]
        assert seen == expected_seen
        assert part == (whole + 1 - rank % 2) // 2
        if way == "dropout":  # whose masks are other ones
            assert [sorted(entry) for entry in history] == [sorted(entry) for entry in expected_history]
        else:
            largest = float(expected_numbers.abs().max())
            torch.testing.assert_close(numbers, expected_numbers, rtol=1e-6, atol=1e-6 * largest)
            for entry, expected in zip(history, expected_history, strict=True):
                assert entry == pytest.approx(expected, rel=2e-6)
        assert torch.equal(numbers, sharded[0][way][1])


def generated(folder: Path, sp_size: int) -> tuple[Tensor, np.ndarray, float]:
    """Weights, generated tokens and loss of a Seq2SeqTrainer after two steps."""
    as_launched()
    torch.manual_seed(0)
    sizes = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "dropout": 0.0, "init_std": 0.2}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=97, **sizes, **heads)).double()
    made = transformers.Seq2SeqTrainer
    if sp_size > 1:
        sp_attention.enable(model, backend="sdpa", sp_size=sp_size)
        made = sequence_parallel(made)
    args = transformers.Seq2SeqTrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, optim="sgd", learning_rate=0.1,
        save_strategy="no", predict_with_generate=True, generation_max_length=9, per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer = made(model=model, args=args, train_dataset=Texts(), data_collator=Collator(False))
    trainer.train()
    predicted = trainer.predict(Texts())
    return weights(trainer), predicted.predictions, predicted.metrics["test_loss"]


def test_a_seq2seq_trainer_generates_and_trains_as_one_process(tmp_path: Path) -> None:
    ((expected, tokens, loss),) = run_ranks(1, generated, tmp_path / "alone", 1)
    assert len({*tokens.flatten().tolist()}) > 4
    for found in run_ranks(2, generated, tmp_path / "shared", 2, timeout=120):
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
        assert (found[1] == tokens).all()
        assert found[2] == pytest.approx(loss, rel=1e-6)


def wrongs(folder: Path) -> dict[str, str]:
    """What is said of trainers that cannot work."""
    texts = {}

    def fails(name: str, way: dict[str, Any], sp_size: int = 2) -> None:
        with pytest.raises(ValueError, match=r"sequence|launch") as error:
            trainer(folder / name, way, sp_size).get_train_dataloader()
        texts[name] = str(error.value)

    fails("not launched", {})
    as_launched()
    fails("dispatched", {"train_dataset": Stream(), "max_steps": 5, "accelerator_config": {"dispatch_batches": True}})
    model = MODELS["llama-6q3kv"].build()
    with pytest.raises(ValueError, match="is not sequence-parallel") as error:
        sequence_parallel(Trainer)(model, TrainingArguments(str(folder), use_cpu=True, report_to=[]))
    texts["not enabled"] = str(error.value)
    return texts


def test_what_cannot_work_is_an_error_with_its_cure(folder: Path) -> None:
    first, second = run_ranks(2, wrongs, folder)
    assert first == second
    assert first["not launched"].startswith("there are 2 processes and accelerate knows of 1, so it would not average")
    assert first["dispatched"].endswith("need the same ones: leave it out, and every rank reads the dataset")
    assert first["not enabled"] == (
        "LlamaForCausalLM is not sequence-parallel: call sp_attention.enable(model) before the trainer is made, or in "
        "model_init"
    )


@pytest.mark.parametrize("name", ["cp_size", "tp_size", "sp_size"])
def test_accelerate_may_not_cut_too(name: str) -> None:
    # An Accelerator takes no such configuration on CPUs.
    accelerator = SimpleNamespace(num_processes=1, parallelism_config=ParallelismConfig(**{name: 2}))
    with pytest.raises(ValueError, match=f"ParallelismConfig has {name}=2, and .* leave {name} out"):
        require_fit(accelerator)


def test_a_sequence_parallel_trainer_is_still_one_of_its_class() -> None:
    made = sequence_parallel(transformers.Seq2SeqTrainer)
    assert issubclass(made, transformers.Seq2SeqTrainer)
    assert made.__name__ == "Seq2SeqTrainer"
