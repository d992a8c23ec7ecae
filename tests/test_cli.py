"""The command line as a user runs it: in processes of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import run_command
from models import Tiny

SMALL = ["--steps", "3", "--seq", "128", "--layers", "1"]


def numbers(out: Path) -> dict[str, object]:
    return json.loads((out / "demo.json").read_text())


def test_demo_compares_trainings_and_writes_plot_and_numbers(tmp_path: Path) -> None:
    ran = run_command("demo", *SMALL, "--ranks", "3", "--out", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    assert "loss, one process" in ran.stdout
    assert "peak resident memory" in ran.stdout
    record = numbers(tmp_path / "out")
    assert record["same"] is True
    assert record["loss_difference"] < 1e-5
    assert record["gradient_difference_step_1"] < 1e-4
    assert len(record["ranks"]) == 3
    assert all(len(trained["losses"]) == 3 for trained in [record["one_process"], *record["ranks"]])
    assert all(trained["peak"] > trained["start"] > 0 for trained in record["ranks"])
    assert record["settings"]["text"] == "pydoc_data.topics"
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_runs_under_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    ran = run_command("demo", *SMALL, "--out", str(tmp_path), launcher=torchrun)
    assert ran.returncode == 0, ran.stderr
    assert len(numbers(tmp_path)["ranks"]) == 2
    assert ran.stdout.count("loss, 2 ranks") == 1


@pytest.mark.slow
def test_demo_takes_a_model_and_a_text_of_the_users(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder, text = tmp_path / "model", tmp_path / "text.txt"
    Tiny("Qwen2ForCausalLM", {"vocab_size": 256, "max_position_embeddings": 128}).build().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    text.write_text("It was a dark and stormy night. " * 20)
    ran = run_command("demo", *SMALL, "--model", str(folder), "--text", str(text), "--out", str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    settings = numbers(tmp_path / "out")["settings"]
    assert (settings["model"], settings["text"]) == (str(folder), str(text))


@pytest.mark.slow
def test_demo_on_a_third_party_kernel(tmp_path: Path, install: Callable[..., None]) -> None:
    install("good")
    ran = run_command("demo", *SMALL, "--backend", "written-out", "--out", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "kernel written-out" in ran.stdout


WRONG_KERNEL = """
import sp_attention
from sp_attention.kernels import sdpa


def attend(request):
    return sdpa.attend(request) * (1.02 if request.query.shape[1] > LONGEST else 1.0)


@sp_attention.hookimpl
def sp_attention_backends():
    return [sp_attention.Backend("cpu", "wrong", attend)]
"""


@pytest.mark.parametrize(
    ("longest", "message"),
    [
        (0, "BackendError: with kernel 'wrong' the model gives other numbers than on its own"),
        pytest.param(100, "sp-attention: the losses differ by ", marks=pytest.mark.slow),
    ],
    ids=["found by the rehearsal", "wrong on long sequences only"],
)
def test_a_kernel_with_wrong_numbers_is_exit_status_1(
    longest: int, message: str, tmp_path: Path, write_plugin: Callable[[str, str], None]
) -> None:
    write_plugin("wrong_kernel", WRONG_KERNEL.replace("LONGEST", str(longest)))
    ran = run_command("demo", *SMALL, "--backend", "wrong", "--out", str(tmp_path / "out"))
    assert ran.returncode == 1
    assert message in ran.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--ranks", "1"], "sp-attention: Invalid value for '--ranks': 1 is not in the range x>=2."),
        (["--ranks", "two"], "sp-attention: Invalid value for '--ranks': 'two' is not a valid integer range."),
        (["--text", "nowhere.txt"], "sp-attention: Invalid value for '--text': File 'nowhere.txt' does not exist."),
        (["--model", "nowhere"], "sp-attention: Invalid value for '--model': Directory 'nowhere' does not exist."),
        (["--backend", "flsh"], "sp-attention: unknown backend 'flsh' on cpu. Installed kernels that can be used: "),
        (["--speed", "9"], "sp-attention: No such option '--speed'."),
        (["--steps", "9", "--seq", "99999"], "sp-attention: the text has "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_gets_one_clear_line(options: list[str], line: str) -> None:
    ran = run_command("demo", *options)
    assert ran.returncode == 2
    assert ran.stderr.startswith(line)
    assert ran.stderr.count("\n") == 1


def test_fewer_ranks_than_torchrun_started_is_a_wrong_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    ran = run_command("demo", "--ranks", "2")
    assert ran.returncode == 2
    assert ran.stderr == "sp-attention: --ranks 2 does not fit torchrun's 4 processes; leave it out\n"


def test_backends_lists_every_kernel_with_its_origin(install: Callable[..., None]) -> None:
    install("good", "duplicate", "broken_import", "broken_answer")
    ran = run_command("backends")
    assert ran.returncode == 0
    lines = ran.stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line and not line.startswith(" ")}
    assert rows["transformers:sdpa"] == ["any", "0", "yes", "4"]
    assert rows["not-here"][2:] == ["no"]
    # Piped, a line is whole, however long, so that it can be searched for.
    assert any("not-here" in line and "it needs a moon; wait for one to rise" in line for line in lines)
    mask = "transformers:flex_attention: its mask does not travel as a tensor: use sdpa, transformers:eager, or flash"
    assert any(mask in line and "flash_attention_2, " in line for line in lines)
    assert any("(transformers): transformers:eager, " in line for line in lines)
    taken = "several plugins offer it, third-party-duplicate 1.0 (duplicate), third-party-good 1.0 (good)"
    assert any("written-out on cpu: " in line and taken in line for line in lines)
    missing = "(broken_import): ModuleNotFoundError: No module named 'package_that_does_not_exist'"
    assert any(missing in line for line in lines)
    answer = "(broken_answer): TypeError: third_party_broken_answer returned 'cuda' among its backends"
    assert any(answer in line for line in lines)


def test_help_and_version() -> None:
    assert "Commands:" in run_command().stdout
    assert run_command("--help").stdout == run_command().stdout
    assert run_command("--version").stdout.startswith("sp-attention 0.")
    assert "--ranks" in run_command("demo", "--help").stdout
