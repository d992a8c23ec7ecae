"""transformers' Trainer: everything that a run logs, and its weights, against as many processes as there are groups."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.parallelism_config import ParallelismConfig
from helpers import Selected, as_launched, run_once, spy
from models import LLAMA
from torch import Tensor
from trainers import SPEED, Collator, Stop, Stream, Texts, logged, trainer, weights
from transformers import Trainer, TrainingArguments

import sp_attention
from sp_attention.integrations.accelerate import require_fit
from sp_attention.integrations.transformers import sequence_parallel
from sp_attention.launch import run_ranks


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


# What came of a run: what was logged, weights and predictions, the texts that this rank was given, tokens in a layer.
Run = tuple[list[dict[str, Any]], Tensor, list[int], int]


def run_way(folder: Path, way: dict[str, Any], sp_size: int) -> Run:
    each = trainer(folder, way, sp_size)
    assert each.is_fsdp_enabled == (sp_size > 1 and "fsdp" in way)
    each.train()
    lengths: set[int] = set()
    each.model.model.layers[0].mlp.register_forward_hook(spy(lambda module, args, output: lengths.add(output.shape[1])))
    predicted = each.predict(Texts())
    history = [*logged(each), {k: v for k, v in predicted.metrics.items() if not k.endswith(SPEED)}]
    history.append({"rows in a step": each.get_total_train_batch_size(each.args)})
    numbers = torch.cat([weights(each), torch.from_numpy(predicted.predictions).flatten()])
    return history, numbers, each.data_collator.seen, max(lengths)


def run_only_loss(folder: Path, sp_size: int) -> Run:
    """An evaluation that is asked for nothing but the loss."""
    each = trainer(folder, {}, sp_size)
    each.compute_metrics = None
    lengths: set[int] = set()
    each.model.lm_head.register_forward_hook(spy(lambda module, args, output: lengths.add(output.shape[1])))
    loss = each.evaluate(Texts())["eval_loss"]
    return [{"loss": loss}], weights(each), [], max(lengths)


def run_resumed(folder: Path, sp_size: int) -> Run:
    trainer(folder, {"save_strategy": "steps", "save_steps": 100}, sp_size, (Stop(),)).train()
    each = trainer(folder, {}, sp_size)
    each.train(resume_from_checkpoint=True)
    return logged(each), weights(each), [], 0


def run(folder: Path, sp_size: int, names: tuple[str, ...]) -> dict[str, Run]:
    as_launched()
    others = {"only loss": run_only_loss, "resumed": run_resumed}
    return {
        name: others[name](folder / name, sp_size) if name in others else run_way(folder / name, WAYS[name], sp_size)
        for name in names
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


CASES = [
    pytest.param(groups, way, marks=[] if way == "plain" else pytest.mark.slow)
    for groups, ways in WAYS_OF.items()
    for way in (*ways, "only loss", "resumed")
]


@pytest.mark.parametrize(("groups", "way"), CASES)
def test_a_run_is_that_of_as_many_processes_as_there_are_groups(
    folder: Path, groups: int, way: str, selected: Selected
) -> None:
    plain, sharded = (
        run_once(groups * size, run, folder / f"{groups} of {size}", size, selected("way", groups=groups), timeout=240)
        for size in (1, 2)
    )
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
    model = LLAMA.build()
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
