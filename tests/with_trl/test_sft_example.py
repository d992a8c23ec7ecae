"""The example runs as its first line says."""

from pathlib import Path

from test_examples import require_runs_and_learns


def test_the_example_runs_and_learns(tmp_path: Path) -> None:
    require_runs_and_learns("sft.py", tmp_path)
