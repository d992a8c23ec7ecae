"""`sp-attention generate`: the text of one process, what it cost, and why not."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from click.testing import CliRunner
from helpers import run_command
from models import Tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sp_attention.cli import cli
from sp_attention.cli.generate import Clock, Request, _generate
from sp_attention.launch import run_ranks

pytestmark = pytest.mark.slow

PROMPT = "It was a dark and stormy night, and the class statement"
NEW = 20


def run(folder: Path, *arguments: str, prompt: str = PROMPT) -> subprocess.CompletedProcess[str]:
    return run_command("generate", str(folder), "--prompt", "-", *arguments, text=prompt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and 6 heads, 2 for keys, of 16 numbers each, in float64, and a tokenizer for English."""
    made = tmp_path_factory.mktemp("model")
    config = {"vocab_size": 400, "hidden_size": 96, "head_dim": 16, "num_key_value_heads": 2}
    Tiny("LlamaForCausalLM", config | {"eos_token_id": None}).build().double().save_pretrained(made)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([topics["class"]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(made)
    return made


def text_of_one_process(folder: Path, **options: object) -> tuple[int, str]:
    """Also how many tokens the prompt has."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    batch = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    length = batch["input_ids"].shape[1]
    tokens = model.generate(**batch, max_new_tokens=NEW, **options)
    return length, tokenizer.decode(tokens[0, length:])


def test_json_has_the_text_of_one_process_and_what_it_cost(folder: Path) -> None:
    ran = run(folder, "--ranks", "2", "--max-new-tokens", str(NEW), "--json", prompt=f"{PROMPT}\n")
    assert ran.returncode == 0, ran.stderr
    record, (length, text) = json.loads(ran.stdout), text_of_one_process(folder, do_sample=False)
    assert record["text"] == text
    assert (record["ranks"], record["backend"], record["dtype"]) == (2, "sdpa", "float64")
    assert (record["prompt_tokens"], record["new_tokens"], record["model"]) == (length, NEW, str(folder))
    assert record["prefill_seconds"] > 0
    assert record["decode_tokens_per_second"] > 0
    # Keys and values of 8 bytes a number; the last token has been through no layer.
    whole = 2 * 2 * 2 * 16 * 8 * (length + NEW - 1)
    assert record["cache_bytes_one_process"] == whole
    assert record["cache_bytes"] == [whole // 2, whole // 2]
    assert len(record["peak_bytes"]) == len(record["peak_bytes_for_generating"]) == 2
    assert min(record["peak_bytes"]) > max(record["peak_bytes_for_generating"]) > 0
    assert len(record) == 13


def test_sampled_text_is_that_of_one_process_with_the_seed_and_stands_before_the_table(folder: Path) -> None:
    ran = run(folder, "--max-new-tokens", str(NEW), "--sample", "--seed", "3", "--temperature", "0.7")
    assert ran.returncode == 0, ran.stderr
    torch.manual_seed(3)
    _, text = text_of_one_process(folder, do_sample=True, temperature=0.7)
    written, _, table = ran.stdout.partition("\n  ")
    assert written == text
    assert "kernel sdpa, float64" in table
    for row in ("prompt, tokens", "new tokens", "to the first token", "tokens/s", "key/value cache", "peak resident"):
        assert row in table


def test_a_folder_without_a_tokenizer_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    ran = CliRunner().invoke(cli, ["generate", str(tmp_path), "--prompt", "-"], input=PROMPT)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1].startswith(f"Error: {tmp_path} has no tokenizer that can be loaded: ")


def test_what_is_refused_is_told(folder: Path) -> None:
    (answer,) = run_ranks(1, _generate, Request(folder, PROMPT, NEW, "flsh", "auto", False, None, 0, False))
    assert answer.reason.startswith("unknown backend 'flsh' on cpu.")


@pytest.mark.parametrize(
    ("options", "prompt", "line"),
    [
        ([], " \n", "the prompt is empty"),
        (["--seed", "1"], PROMPT, "--temperature and --seed are for --sample; give that too, or leave them out"),
        (["--ranks", "1"], PROMPT, "Invalid value for '--ranks': 1 is not in the range x>=2."),
    ],
    ids=["empty prompt", "seed without sample", "one rank"],
)
def test_a_wrong_option_gets_one_clear_line(tmp_path: Path, options: list[str], prompt: str, line: str) -> None:
    ran = CliRunner().invoke(cli, ["generate", str(tmp_path), "--prompt", "-", *options], input=prompt)
    assert (ran.exit_code, ran.stderr.splitlines()[-1]) == (2, f"Error: {line}")


def test_the_clock_tells_the_first_token_from_the_rest_and_hands_everything_on() -> None:
    given: list[object] = []

    class Other:
        put: Callable[[object], None] = given.append

        def end(self) -> None:
            given.append("end")

    clock = Clock(Other())
    for value in (torch.tensor([[1, 2]]), torch.tensor([3]), torch.tensor([4])):
        clock.put(value)
    clock.end()
    assert [len(given), given[-1]] == [4, "end"]
    clock.times = [1.0, 3.0, 7.0]
    assert (clock.prefill, clock.decode) == (2.0, 4.0)
