"""`sp-attention verify`: exact, refused and wrong models, told apart by status, table and JSON."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_command

from sp_attention.cli.differences import error_of, largest_error
from sp_attention.cli.outcomes import Comparison, Verdict
from sp_attention.cli.reduced import NotBuildableError, build, prepare, tasks_of, types_of
from sp_attention.cli.subject import Subject, prepared

# A layer that is right alone and in the rehearsal, and wrong on a part of a longer sequence.
WRONG = """
from torch import nn
from sp_attention.cli.reduced import build

class Wrong(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden):
        return self.mlp(hidden) * (1.5 if 16 <= hidden.shape[1] <= 17 else 1.0)

def model():
    llama = build("llama", "causal-lm")
    llama.model.layers[1].mlp = Wrong(llama.model.layers[1].mlp)
    return llama
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("verify", *arguments, folder=folder)


def test_an_exact_model(tmp_path: Path) -> None:
    ran = run(
        tmp_path, "qwen3", "--backend", "sdpa", "--kinds", "plain,packed", "--with", "two-forwards,no-grad,frozen"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("Qwen3ForCausalLM (causal-lm), 42 thousand parameters, float64")
    rows = [tuple(re.split(" {2,}", line)[:2]) for line in ran.stdout.splitlines()[3:11]]
    assert rows == [
        (kind + variant, "exact")
        for variant in ("", ", two-forwards", ", no-grad", ", frozen")
        for kind in ("plain", "packed")
    ]
    assert "head-parallel: self_attn\n" in ran.stdout


@pytest.mark.slow
def test_json_on_three_ranks(tmp_path: Path) -> None:
    ran = run(tmp_path, "llama", "--ranks", "3", "--kinds", "plain", "--with", "checkpointing,hidden-states", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record: dict[str, Any] = json.loads(ran.stdout)
    batches = record.pop("batches")
    assert record.pop("parts")["head-parallel"] == ["self_attn"]
    assert record.pop("parameters") > 10_000
    assert record == {
        "model": "LlamaForCausalLM",
        "task": "causal-lm",
        "ranks": 3,
        "backend": "sdpa",
        "dtype": "float64",
        "outcome": "exact",
        "reason": "",
    }
    assert [batch["kind"] for batch in batches] == ["plain", "plain, checkpointing", "plain, hidden-states"]
    assert all(batch.keys() == {"kind", "outcome", "error", "of", "reason", "first"} for batch in batches)
    assert all(batch["error"] < 1e-5 and batch["first"] is None for batch in batches)


def test_a_wrong_model_is_status_1_and_names_the_first_module(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    ran = run(tmp_path, "wrong:model", "--kinds", "plain,right-padded")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "plain: the first module whose output differs is model.layers.1.mlp, by " in ran.stdout
    assert ran.stdout.endswith("differs\n")


@pytest.mark.slow
def test_modules_of_the_current_folder_take_the_place_of_none(tmp_path: Path) -> None:
    for name in ("queue", "tokenizers", "safetensors", "sp_attention"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the current folder')")
    (tmp_path / "mine.py").write_text(WRONG)
    for model, status in (("llama", 0), ("mine:model", 1)):
        command = ["verify", model, "--kinds", "plain"]
        ran = run_command(*command, folder=tmp_path, launcher=("-P", "-m"))
        assert ran.returncode == status, ran.stdout + ran.stderr


def test_a_refused_model_is_status_2_and_says_why(tmp_path: Path) -> None:
    ran = run(tmp_path, "llama", "--backend", "flsh")
    assert ran.returncode == 2
    assert "refused: unknown backend 'flsh' on cpu." in ran.stdout


@pytest.mark.slow
def test_what_cannot_be_verified_is_status_2(tmp_path: Path) -> None:
    ran = run(tmp_path, "nowhere:model")
    assert ran.returncode == 2
    assert ran.stderr.startswith("sp-attention: nowhere:model cannot be verified: 'nowhere:model' cannot be called: ")


def test_a_wrong_kind_is_status_2(tmp_path: Path) -> None:
    ran = run(tmp_path, "llama", "--kinds", "plane")
    assert ran.returncode == 2
    assert "'plane' is not one of plain, left-padded, right-padded, packed, pixels." in ran.stderr


def test_a_folder_is_reduced_or_taken_with_its_weights(tmp_path: Path) -> None:
    model = build("llama", "causal-lm")
    model.config.num_hidden_layers = 3
    model = type(model)(model.config)
    model.save_pretrained(tmp_path)
    reduced = prepared(Subject(str(tmp_path), None, 33, full=False))
    full = prepared(Subject(str(tmp_path), None, 33, full=True))
    assert (len(reduced.model.model.layers), len(full.model.model.layers)) == (2, 3)
    assert full.model.lm_head.weight.equal(model.lm_head.weight.double())
    assert (full.task, full.model.training, full.batches["plain"]["input_ids"].shape) == ("causal-lm", True, (2, 33))


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        (Subject("mambo", None, 33, full=False), "'mambo' is no folder, no module:function, and no type of models"),
        (Subject("llama", "masked-lm", 33, full=False), "llama has no model for 'masked-lm', but for causal-lm, "),
        (Subject("llama", None, 33, full=True), "--full is for a folder or module:function, and 'llama' is neither"),
        (Subject("math:nothing", None, 33, full=False), "'math:nothing' cannot be called: module 'math' has no attr"),
        (Subject("os:getpid", None, 33, full=False), "'os:getpid' returns a int, not a transformers model"),
    ],
    ids=lambda value: value.model if isinstance(value, Subject) else "",
)
def test_a_subject_that_is_none_says_why(subject: Subject, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        prepared(subject)


def test_reduced_models_are_the_same_every_time() -> None:
    (first, batches), (second, again) = prepare("qwen3", "causal-lm", 33), prepare("qwen3", "causal-lm", 33)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert list(batches) == ["plain", "left-padded", "right-padded", "packed"]
    assert all(batches[kind][name].equal(again[kind][name]) for kind in batches for name in ("input_ids", "labels"))
    assert first.dtype == torch.float64
    assert (first.config.num_attention_heads, first.config.num_key_value_heads) == (6, 3)


@pytest.mark.parametrize(
    ("model_type", "task"),
    [
        ("t5", "seq2seq-lm"),
        ("bert", "question-answering"),
        ("whisper", "speech-seq2seq"),
        ("vit", "image-classification"),
        ("qwen2_vl", "image-text-to-text"),
    ],
)
def test_every_task_has_batches(model_type: str, task: str) -> None:
    model, batches = prepare(model_type, task, 33)
    assert model.num_parameters() < 6e6
    assert model(**batches["plain"]).loss.isfinite()
    assert task in tasks_of(model_type)
    if task == "image-text-to-text":
        assert model(**batches["pixels"]).loss.isfinite()
    if task == "seq2seq-lm":
        assert batches["plain"]["labels"].shape[1] != batches["plain"]["input_ids"].shape[1]


def test_every_kind_of_layer_is_in_a_reduced_model() -> None:
    model, _ = prepare("qwen3_next", "causal-lm", 33)
    assert set(model.config.layer_types) == {"linear_attention", "full_attention"}


def test_what_cannot_be_built_says_why() -> None:
    assert "layoutlmv2" in types_of("question-answering")
    with pytest.raises(NotBuildableError, match="requires the detectron2 library"):
        prepare("layoutlmv2", "question-answering", 33)


def test_errors_are_relative_to_the_whole_and_only_where_that_is_finite() -> None:
    whole = torch.tensor([4.0, 2.0, float("inf")])
    assert error_of(torch.tensor([4.0, 1.0, 0.0]), whole) == 0.25
    assert error_of(whole[2:], whole[2:]) is None
    assert largest_error({"loss": whole}, {"loss": whole, "logits": whole}) == (float("inf"), "logits")
    assert largest_error({"loss": whole * float("nan")}, {"loss": whole}) == (float("inf"), "loss")


def test_the_worst_verdict_counts() -> None:
    def outcome(*outcomes: str) -> str:
        return Comparison(tuple(Verdict("plain", outcome) for outcome in outcomes)).outcome

    assert outcome("exact", "not comparable") == "exact"
    assert outcome("exact", "refused") == "refused"
    assert outcome("refused", "differs", "exact") == "differs"
    assert outcome("not comparable") == "not comparable"
