"""The script for SLURM on two machines, of which this one plays both; srun and scontrol are stand-ins."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAND_INS = {
    "srun": """
for node in $(seq "$SLURM_NNODES"); do "$@" & started+=($!); done
for one in "${started[@]}"; do wait $one; done
""",
    "scontrol": "echo localhost; echo elsewhere",
}


@pytest.mark.slow
def test_two_machines_train_together(tmp_path: Path) -> None:
    for name, lines in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "two",
        "PORT": f"{port}",
    }
    script = ROOT / "examples" / "slurm.sh"
    ran = subprocess.run([script], cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert ran.returncode == 0, ran.stderr
    losses = [float(number) for number in re.findall(r"'loss': '?(\d+\.\d+)", ran.stdout)]
    # torchrun begins when both are there, and the first process of all logs.
    assert len(losses) == 4
    assert losses[-1] < losses[0]
