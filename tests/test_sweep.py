"""The sweep: results that can be resumed, and a page of tables."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_results_are_kept_and_tabled(tmp_path: Path) -> None:
    def run(types: str) -> subprocess.CompletedProcess[str]:
        options = ["--mapping", "question-answering", "--types", types, "--table", str(tmp_path / "models.md")]
        options += ["--with", "no-grad"]
        command = [sys.executable, "-m", "sweep", *options, "--results", str(tmp_path / "results.jsonl")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # In the source tree, of which the sweep is a part and the package is not.
        root = Path(__file__).parent.parent
        return subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=True, timeout=300, env=environment
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
