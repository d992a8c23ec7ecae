"""Trainer with ZeRO: what a run logs, its weights and what it saves, against plain processes without DeepSpeed."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import as_launched
from models import LLAMA
from safetensors.torch import load_file
from torch import Tensor
from trainers import Collator, Stop, Texts, logged, trainer
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import sp_attention
from sp_attention.integrations.transformers import sequence_parallel
from sp_attention.launch import run_ranks

STAGES = (0, 1, 2, 3)
# With 1 and 3 accumulated batches, in which the numbers of tokens differ.
WAYS: dict[str, dict[str, Any]] = {
    "each": {"gradient_accumulation_steps": 1, "max_steps": 6},
    "accumulated": {"num_train_epochs": 1},
    "clipped": {"max_grad_norm": 0.5, "max_steps": 2, "average_tokens_across_devices": False},
}
AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
}


def under_deepspeed(stage: int) -> dict[str, Any]:
    """Options of a trainer: ZeRO, as accelerate takes it on CPUs, from a state that is told of the backend."""
    from accelerate.state import AcceleratorState, PartialState
    from zero import config, dtype_of

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")
    zero = config(stage)["zero_optimization"] | {"stage3_gather_16bit_weights_on_model_save": True}
    return {
        "deepspeed": {**AUTO, "zero_optimization": zero},
        "use_cpu": False,
        "accelerator_config": {"use_configured_state": True},
        "dtype": dtype_of(stage),
    }


def saved(trainer: Trainer) -> dict[str, Tensor]:
    """The weights in the file that a trainer saves, by their names, on every rank."""
    trainer.save_model()
    dist.barrier()  # One rank writes it.
    return load_file(Path(trainer.args.output_dir, "model.safetensors"))


def run(folder: Path, sp_size: int, stages: tuple[int | None, ...]) -> dict[Any, Any]:
    """Every way in every stage, and without DeepSpeed for None: what was logged, weights, predictions."""
    if stages != (None,):
        from zero import launched

        launched()
    as_launched()
    found = {}
    for stage in stages:
        for name, way in WAYS.items():

            def made(
                place: str, more: dict[str, Any], *callbacks: Any, stage: int | None = stage, way: Any = way
            ) -> Any:
                options = {"gradient_accumulation_steps": 3, **way, **more}
                engine = {} if stage is None else under_deepspeed(stage)
                return trainer(folder / f"{stage} {place}", options | engine, sp_size, callbacks)

            each = made(name, {})
            each.train()
            predicted = torch.from_numpy(each.predict(Texts()).predictions)
            found[stage, name] = logged(each), saved(each), predicted
            if name == "accumulated":
                made("resumed", {"save_strategy": "steps", "save_steps": 100}, Stop()).train()
                second = made("resumed", {})
                second.train(resume_from_checkpoint=True)
                found[stage, "resumed"] = logged(second), saved(second), predicted
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@cache
def runs(folder: Path, groups: int, sp_size: int) -> list[dict[Any, Any]]:
    stages = (None,) if sp_size == 1 else STAGES
    return run_ranks(groups * sp_size, run, folder / f"{groups} of {sp_size}", sp_size, stages, timeout=600)


def the_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("groups", [1, 2], ids="{}-groups".format)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", [*WAYS, "resumed"])
def test_a_run_is_that_of_as_many_plain_processes_as_there_are_groups(
    folder: Path, groups: int, stage: int, way: str
) -> None:
    plain, sharded = runs(folder, groups, 1), runs(folder, groups, 2)
    # DeepSpeed has no gradient norm in stage 0, and Trainer counts operations by the sizes of parameters, of which
    # stage 3 leaves none.
    missing = {0: {"grad_norm"}, 3: {"total_flos"}}.get(stage, set())
    for rank, found in enumerate(sharded):
        expected_history, expected_weights, expected_predictions = plain[rank // 2][None, way]
        history, weights, predictions = found[stage, way]
        the_same(weights, expected_weights)
        the_same({"predictions": predictions}, {"predictions": expected_predictions})
        for entry, expected in zip(history, expected_history, strict=True):
            for name in missing:
                entry.pop(name, None)
                expected = {key: value for key, value in expected.items() if key != name}
            assert entry == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_is_that_of_a_plain_run(folder: Path, stage: int) -> None:
    runs(folder, 1, 1)
    runs(folder, 1, 2)
    configs = [
        json.loads((place / "config.json").read_text())
        for place in (folder / "1 of 1" / "None each", folder / "1 of 2" / f"{stage} each")
    ]
    for config in configs:
        config.pop("dtype")  # Stage 0 trains in float32.
    assert configs[0] == configs[1]


def partitioned(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """A model that is loaded when Trainer's arguments are there already, and so in parts: its size, and its weights."""
    import deepspeed
    from zero import launched

    launched()
    options = under_deepspeed(3)
    dtype = options.pop("dtype")
    options |= {"per_device_train_batch_size": 2, "num_train_epochs": 1, "gradient_accumulation_steps": 3}
    options |= {"learning_rate": 0.1, "max_grad_norm": 0, "optim": "sgd", "save_strategy": "no"}
    args = TrainingArguments(str(folder / "out"), report_to=[], disable_tqdm=True, seed=3, **options)
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    size = sum(parameter.numel() for parameter in model.parameters())
    with deepspeed.zero.GatheredParameters(model.parameters()):
        sp_attention.enable(model, backend="sdpa")
    made = sequence_parallel(Trainer)(model=model, args=args, train_dataset=Texts(), data_collator=Collator(False))
    made.train()
    return size, saved(made)


def test_a_model_is_enabled_with_its_weights_gathered(folder: Path) -> None:
    LLAMA.build().save_pretrained(folder / "model")
    expected = runs(folder, 1, 1)[0][None, "accumulated"][1]
    for size, weights in run_ranks(2, partitioned, folder, timeout=200):
        assert size == 0
        the_same(weights, expected)
