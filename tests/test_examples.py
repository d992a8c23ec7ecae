"""The examples run as their first line says."""

from pathlib import Path

import pytest
from helpers import EXAMPLES, require_example_learns

pytestmark = pytest.mark.slow

# Those whose packages are in environments of their own, and whose tests are too.
ELSEWHERE = {"sft.py", "deepspeed_loop.py"}
NAMES = {file.name for file in EXAMPLES.glob("*.py")} - {"data.py"} - ELSEWHERE


@pytest.mark.parametrize("name", sorted(NAMES))
def test_examples_run_and_learn(name: str, tmp_path: Path) -> None:
    require_example_learns(name, tmp_path)
