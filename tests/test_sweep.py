"""The sweeps: results that can be resumed, and pages of tables."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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

    first, second = run("llama,layoutlmv2").stdout.splitlines()
    assert first.startswith("question-answering on 2 ranks: 2 types, 1 built: 1 exact, 0 partly refused, 0 refused")
    assert second == "with no-grad on 2 ranks, batches: 3 exact"
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["type"] for record in records] == ["layoutlmv2", "llama"]
    assert "detectron2" in records[0]["not_buildable"]
    kinds = ["plain", "left-padded", "right-padded"]
    assert [verdict["kind"] for verdict in records[1]["verdicts"]] == [*kinds, *(f"{kind}, no-grad" for kind in kinds)]
    assert "| llama | exact, head-parallel | sdpa | " in (tmp_path / "models.md").read_text()
    run("llama")  # has a result
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
