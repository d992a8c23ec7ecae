"""The example runs as its first line says."""

from pathlib import Path

import pytest
from helpers import require_example_learns


def test_the_example_runs_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On CPUs DeepSpeed compiles something when it starts. Where that was interrupted before it would wait for ever.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    require_example_learns("deepspeed_loop.py", tmp_path, timeout=500)
