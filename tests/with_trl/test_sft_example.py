"""The example runs as its first line says."""

from pathlib import Path

from helpers import require_example_learns


def test_the_example_runs_and_learns(tmp_path: Path) -> None:
    require_example_learns("sft.py", tmp_path)
