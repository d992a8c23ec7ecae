"""Fixtures that several test files use."""

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured
import pytest
from helpers import THIRD_PARTY, Selected

from sp_attention.distributed import launch

# Where the sweeps are, and the stages of ci/gpu, which are no part of the package.
sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "ci")]

# Ranks are forks of a process that has imported, and done nothing else, what takes each of them seconds to import.
launch.CONTEXT = multiprocessing.get_context("forkserver")
launch.CONTEXT.set_forkserver_preload(
    [
        "sp_attention.api",
        "sp_attention.distributed.launch",
        "transformers.models.llama.modeling_llama",
        "hypothesis",
        "pytest",
    ]
)


@pytest.fixture(autouse=True)
def counts_lines_of_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--cov`, which tox gives."""
    if request.config.pluginmanager.hasplugin("_cov") and request.path.stem in measured.MODULES:
        monkeypatch.setattr(launch, "_work", measured.work)


@pytest.fixture
def selected(request: pytest.FixtureRequest) -> Selected:
    """selected("name", ranks=2): what `name` is in the cases of this test that are run and have these parameters.

    So one start of ranks serves all cases of a test, and with `-k llama` it computes those of llama only.
    """

    def values(name: str, **others: Any) -> tuple[Any, ...]:
        cases = [
            item.callspec.params
            for item in request.session.items
            if (item.path, getattr(item, "originalname", None)) == (request.path, request.node.originalname)
        ]
        return tuple(dict.fromkeys(case[name] for case in cases if others.items() <= case.items()))

    return values


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install third-party plugins from tests/third_party for one test; new processes see them too."""

    def installed(*names: str) -> None:
        target = tmp_path / "site"
        sources = [str(THIRD_PARTY / name) for name in names]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*pip, "--target", str(target), *sources], check=True)
        monkeypatch.syspath_prepend(target)
        monkeypatch.setenv("PYTHONPATH", str(target))

    return installed


@pytest.fixture
def write_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a third-party plugin of one module, given as its source, for one test; new processes see it too.

    Its name must be one that no other test uses: what was imported stays.
    """

    def written(name: str, source: str, group: str = "sp_attention") -> None:
        site = tmp_path / "site"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("PYTHONPATH", str(site))

    return written
