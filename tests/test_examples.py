"""The examples run as their first line says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# Those whose packages are in environments of their own, and whose tests are too.
ELSEWHERE = {"sft.py", "deepspeed_loop.py"}
NAMES = {file.name for file in EXAMPLES.glob("*.py")} - {"data.py"} - ELSEWHERE


def require_runs_and_learns(name: str, folder: Path, timeout: float = 180) -> None:
    first, *_ = (EXAMPLES / name).read_text().splitlines()
    assert first.endswith(f'torchrun --nproc-per-node 2 examples/{name}"""')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLES / name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, env=environment)
    assert ran.returncode == 0, ran.stderr
    losses = [float(number) for number in re.findall(r"loss'?:? '?(\d+\.\d+)", ran.stdout)]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_examples_run_and_learn(name: str, tmp_path: Path) -> None:
    require_runs_and_learns(name, tmp_path)
