"""TRL's trainers: everything that a run logs, and its weights, against as many processes as there are groups."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from helpers import as_launched, spy
from models import LLAMA, MODELS, Tiny
from texts import TEXTS, tokenizer
from torch import Tensor, nn
from trainers import logged, weights
from transformers import Trainer

import sp_attention
from sp_attention.integrations.transformers import sequence_parallel
from sp_attention.launch import run_ranks

REWARD = Tiny("LlamaForSequenceClassification", {"num_labels": 1})

LORA = {"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "up_proj"]}

# What a run takes: the trainer's options, and besides "model", "data", "lora" and "reference".
SFT = {
    "padded": {"eval_strategy": "steps", "eval_steps": 2, "include_num_input_tokens_seen": "all"},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 40},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 24},
    "completion only": {"data": "completions"},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": LORA, "gradient_checkpointing": True},
    "mixtral": {"model": MODELS["mixtral"]},
}
DPO = {
    "plain reference": {"reference": "plain", "eval_strategy": "steps", "eval_steps": 2},
    "enabled reference": {"reference": "enabled"},
    "copied reference": {"reference": None},
    "precomputed": {"reference": "plain", "precompute_ref_log_probs": True},
    "lora": {"lora": LORA},
}
REWARDS = {"plain": {"eval_strategy": "steps", "eval_steps": 2}, "lora": {"model": REWARD, "lora": LORA}}
KTO = {"plain reference": {"reference": "plain"}}
GRPO = {
    "plain": {"num_generations": 2, "eval_strategy": "steps", "eval_steps": 4},
    # Of two processes or groups: one has too few completions at a time.
    "prompts on several processes": {"num_generations": 4, "per_device_train_batch_size": 1, "num_iterations": 2},
    "reference": {"num_generations": 2, "beta": 0.1},
    "lora": {"num_generations": 2, "beta": 0.1, "lora": LORA},
}
RLOO = {"plain": {"num_generations": 2, "beta": 0.0}}
WAYS: dict[str, tuple[type[Trainer], type, dict[str, dict[str, Any]]]] = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig, SFT),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, DPO),
    "Reward": (trl.RewardTrainer, trl.RewardConfig, REWARDS),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, KTO),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, GRPO),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, RLOO),
}
# For one group, against one process; and for two, where groups get different batches.
ONE_GROUP = [(name, way) for name, (_, _, ways) in WAYS.items() for way in ways if "several" not in way]
TWO_GROUPS = [
    ("SFT", "padded"),
    ("SFT", "packed"),
    ("DPO", "plain reference"),
    ("DPO", "precomputed"),
    ("Reward", "plain"),
    ("KTO", "plain reference"),
    ("GRPO", "plain"),
    ("GRPO", "prompts on several processes"),
]
CASES = [(1, *each) for each in ONE_GROUP] + [(2, *each) for each in TWO_GROUPS]


def rows(name: str) -> list[dict[str, Any]]:
    prompts = [text[: 4 + number % 5] for number, text in enumerate(TEXTS)]
    answers = [text[4 + number % 5 :] for number, text in enumerate(TEXTS)]
    if name == "texts":
        return [{"text": text} for text in TEXTS]
    if name == "completions":
        return [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    if name == "prompts":
        return [{"prompt": prompt} for prompt in prompts]
    if name == "judged":
        each = zip(prompts, answers, strict=True)
        return [
            {"prompt": prompt, "completion": answer, "label": number % 3 > 0}
            for number, (prompt, answer) in enumerate(each)
        ]
    each = zip(prompts, answers, reversed(answers), strict=True)
    return [{"prompt": prompt, "chosen": answer, "rejected": other} for prompt, answer, other in each]


DATA = {
    "SFT": "texts",
    "DPO": "pairs",
    "Reward": "pairs",
    "KTO": "judged",
    "GRPO": "prompts",
    "RLOO": "prompts",
}


def early_letters(completions: list[str], **_: Any) -> list[float]:
    """A reward: the part of letters in the first half of the alphabet."""
    return [sum(letter.lower() < "n" for letter in completion) / (1 + len(completion)) for completion in completions]


def trainer(folder: Path, name: str, way: dict[str, Any], sp_size: int) -> Trainer:
    trainer_class, config_class, _ = WAYS[name]
    options = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "learning_rate": 0.1,
        "max_grad_norm": 0,
        "optim": "sgd",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
    } | way
    tiny = options.pop("model", REWARD if name == "Reward" else LLAMA)
    data, lora, reference = options.pop("data", DATA[name]), options.pop("lora", None), options.pop("reference", None)
    others: dict[str, Any] = {"peft_config": None if lora is None else peft.LoraConfig(**lora)}
    model = tiny.build()
    if name in ("GRPO", "RLOO"):
        others["reward_funcs"] = [early_letters]
        options |= {"max_completion_length": 12, "per_device_eval_batch_size": 2}
    if reference is not None:
        others["ref_model"] = tiny.build()
    elif name not in ("SFT", "Reward") and lora is None:
        # The trainer loads another one from where this one is from.
        on_first_rank(lambda: model.save_pretrained(folder / "model"))
        model = type(model).from_pretrained(folder / "model", dtype=torch.float64)
    if sp_size > 1:
        sp_attention.enable(model, backend="sdpa", sp_size=sp_size)
        trainer_class = sequence_parallel(trainer_class)
    if reference == "enabled" and sp_size > 1:
        sp_attention.enable(others["ref_model"], backend="sdpa", sp_size=sp_size)
    return trainer_class(
        model=model,
        args=config_class(
            str(folder), use_cpu=True, logging_steps=1, report_to=[], disable_tqdm=True, seed=3, **options
        ),
        train_dataset=on_disk(folder / "train", rows(data)),
        eval_dataset=on_disk(folder / "eval", rows(data)[:7]),
        processing_class=tokenizer(),
        **others,
    )


def on_disk(folder: Path, rows: list[dict[str, Any]]) -> Dataset:
    """Where all ranks find what one of them computed in advance."""
    on_first_rank(lambda: Dataset.from_list(rows).save_to_disk(folder))
    return datasets.load_from_disk(folder)


def on_first_rank(step: Callable[[], Any]) -> None:
    if not dist.get_rank():
        step()
    dist.barrier()


def run(folder: Path, sp_size: int, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Every way: what was logged, all weights, and how many tokens layers saw of how many."""
    as_launched()
    datasets.disable_progress_bars()
    found = {}
    for name, way in cases:
        each = trainer(folder / name / way, name, WAYS[name][2][way], sp_size)
        lengths: list[int] = []
        layer = next(
            module
            for name, module in each.model.named_modules()
            if type(module).__name__.endswith(("RMSNorm", "MLP")) and "layers.0" in name
        )

        def note(module: nn.Module, args: Any, output: Tensor, seen: list[int] = lengths) -> None:
            if torch.is_grad_enabled():  # and not in what is generated
                seen.append(output.shape[1])

        layer.register_forward_hook(spy(note))
        each.train()
        history = [{key: value for key, value in entry.items() if key != "step_time"} for entry in logged(each)]
        found[name, way] = history, weights(each), lengths
    return found


@cache
def runs(folder: Path, groups: int, sp_size: int) -> list[dict[tuple[str, str], Any]]:
    cases = ONE_GROUP if groups == 1 else TWO_GROUPS
    return run_ranks(groups * sp_size, run, folder / f"{groups} of {sp_size}", sp_size, cases, timeout=500)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.mark.parametrize(("groups", "name", "way"), CASES)
def test_a_run_is_that_of_as_many_processes_as_there_are_groups(folder: Path, groups: int, name: str, way: str) -> None:
    plain, sharded = runs(folder, groups, 1), runs(folder, groups, 2)
    for rank, found in enumerate(sharded):
        expected_history, expected_weights, whole = plain[rank // 2][name, way]
        history, each, parts = found[name, way]
        assert parts == [(length + 1 - rank % 2) // 2 for length in whole]
        torch.testing.assert_close(each, expected_weights, rtol=1e-6, atol=1e-6 * float(expected_weights.abs().max()))
        assert torch.equal(each, sharded[0][name, way][1])
        for entry, expected in zip(history, expected_history, strict=True):
            assert entry == pytest.approx(expected, rel=2e-6)


def refused(folder: Path) -> dict[str, str]:
    as_launched()
    texts = {}
    for name, way in {
        "log_completions": ("GRPO", {"num_generations": 2, "log_completions": True}),
        "beta": ("RLOO", {"num_generations": 2, "beta": 0.1}),
        "few": ("GRPO", {"num_generations": 4, "per_device_train_batch_size": 1}),
    }.items():
        with pytest.raises((ValueError, sp_attention.UnsupportedError)) as error:
            trainer(folder / name, *way, sp_size=2).get_train_dataloader()
        texts[name] = str(error.value)
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    args = trl.SFTConfig(str(folder), use_cpu=True, report_to=[], bf16=False)
    with pytest.raises(sp_attention.BatchError) as error:
        trl.SFTTrainer(
            model, args, train_dataset=on_disk(folder / "texts", rows("texts")), processing_class=tokenizer()
        ).train()
    texts["not sequence-parallel"] = str(error.value)
    return texts


def test_what_is_not_covered_is_refused_with_its_cure(folder: Path) -> None:
    first, second = run_ranks(2, refused, folder / "refused")
    assert first == second
    assert first["log_completions"] == (
        "log_completions is not covered under sequence parallelism: leave it out, and completions come from the "
        "model's own generate()"
    )
    assert first["beta"].endswith("and not from each group: set beta=0.0, or use GRPOTrainer")
    assert first["few"] == (
        "all groups together generate 2 completions at a time, and each prompt has 4: make "
        "per_device_train_batch_size larger, since the ranks of a group share one batch"
    )
    assert "were given different batches" in first["not sequence-parallel"]
