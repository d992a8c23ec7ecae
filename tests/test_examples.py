"""The examples run as their first line says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# Run with the package that they need, in an environment of its own.
APART = {"deepspeed_loop.py"}


@pytest.mark.parametrize("name", sorted({file.name for file in EXAMPLES.glob("*.py")} - APART - {"data.py"}))
def test_examples_run_and_learn(name: str, tmp_path: Path) -> None:
    runs_and_learns(name, tmp_path)


def runs_and_learns(name: str, tmp_path: Path, timeout: float = 180) -> None:
    first, *_ = (EXAMPLES / name).read_text().splitlines()
    assert first.endswith(f'torchrun --nproc-per-node 2 examples/{name}"""')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLES / name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, env=environment)
    assert ran.returncode == 0, ran.stderr
    losses = [float(number) for number in re.findall(r"loss'?:? '?(\d+\.\d+)", ran.stdout)]
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
