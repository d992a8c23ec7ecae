"""Fixtures that several test files use."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STRANGERS = Path(__file__).parent / "strangers"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install third-party plugins from tests/strangers for one test; new processes see them too."""

    def installed(*names: str) -> None:
        target = tmp_path / "site"
        sources = [str(STRANGERS / name) for name in names]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*pip, "--target", str(target), *sources], check=True)
        monkeypatch.syspath_prepend(target)
        monkeypatch.setenv("PYTHONPATH", str(target))

    return installed
