"""The sweeps: results that can be resumed, and pages of tables."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import sp_attention
from sp_attention.cli.reduced import prepare
from sp_attention.cli.reduced.sizes import BEYOND
from sp_attention.launch import run_ranks

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_twenty_accumulated_steps_of_two_groups_are_those_of_one_process() -> None:
    # What no test of gradients has; the page has all.
    engines = ("DDP, static graph", "DDP, unused parameters", "FSDP2, offloaded", "HSDP")
    options = [option for engine in engines for option in ("--engine", engine)]
    command = [sys.executable, "-m", "sweep.engines", "--shape", "2 x 2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for engine in engines:
        assert f"| {engine} | " in ran.stdout


def test_no_engine_of_the_page_is_wrong() -> None:
    _, _, *rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "engines.md").read_text(), re.MULTILINE)
    assert len(rows) > 8
    for row in rows:
        assert all(float(error or 0) < 1e-6 for error in row.split(" | ")[1:])
    assert {"none", "DDP", "FSDP2", "HSDP", "ZeRO-3"} < {row.split(" | ")[0] for row in rows}


@pytest.mark.slow
def test_results_are_kept_and_tabled(tmp_path: Path) -> None:
    def run(types: str) -> subprocess.CompletedProcess[str]:
        options = ["--mapping", "question-answering", "--types", types, "--table", str(tmp_path / "models.md")]
        options += ["--with", "no-grad"]
        command = [sys.executable, "-m", "sweep", *options, "--results", str(tmp_path / "results.jsonl")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # In the source tree, of which the sweep is a part and the package is not.
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300, env=environment
        )

    *lines, varied = run("llama,layoutlmv2").stdout.splitlines()
    counts = "2 types, 1 built: 1 exact, 0 partly refused, 0 refused"
    for length, line in zip((33, BEYOND), lines, strict=True):
        assert line.startswith(f"question-answering on 2 ranks, {length} tokens: {counts}")
    assert varied == "with no-grad on 2 ranks, batches: 6 exact"
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["type"] for record in records] == 2 * ["layoutlmv2", "llama"]
    assert [record["length"] for record in records] == [33, 33, BEYOND, BEYOND]
    assert "detectron2" in records[0]["not_buildable"]
    kinds = ["plain", "left-padded", "right-padded"]
    assert [verdict["kind"] for verdict in records[1]["verdicts"]] == [*kinds, *(f"{kind}, no-grad" for kind in kinds)]
    assert f"| llama | exact, head-parallel | sdpa | 33, {BEYOND} | " in (tmp_path / "models.md").read_text()
    run("llama")  # has a result
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def generation() -> list[dict[str, Any]]:
    """What the sweep of generation says of a model that is right, wrong on a rank, and with too large a cache."""
    # Where the sweeps are, as they are no part of the package.
    sys.path.insert(0, str(ROOT))
    from sweep import generation as sweep

    enable = sp_attention.enable

    def wrong_on_a_rank(model: PreTrainedModel) -> sp_attention.Handle:
        handle = enable(model)
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.lm_head.weight[40] *= 1.001
        return handle

    def keeping_all(model: PreTrainedModel) -> sp_attention.Handle:
        handle = enable(model)
        handle.disable()
        return handle

    found = []
    for one in (enable, wrong_on_a_rank, keeping_all):
        model, batches = prepare("llama", "causal-lm", 19)
        with patch.object(sp_attention, "enable", one):
            found.append(sweep.compare(model, batches, ("greedy", "left padding")))
    return found


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_in_generation_is_called_so() -> None:
    for right, wrong, large in run_ranks(2, generation):
        assert {verdict["outcome"] for verdict in right["verdicts"]} == {"exact"}
        assert right["caches"] == "hold this rank's heads; ranks hold some key heads alike: 4 for 3"
        assert right["share"] == pytest.approx(2 / 3)
        assert right["allowed"] == pytest.approx(1 / 2 + 1 / 3)
        assert [verdict["kind"] for verdict in wrong["verdicts"]] == ["greedy", "left padding"]
        assert {verdict["outcome"] for verdict in wrong["verdicts"]} == {"differs"}
        assert large["share"] == 1 > large["allowed"]
