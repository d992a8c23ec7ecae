"""The template of a kernel package: CONTRIBUTING's commands, as they stand there, make a package that trains."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "backends" / "template"
TRAIN = """
from sp_attention.launch import run_ranks
from helpers import train_on

for loss_error, gradient_error, report in run_ranks(2, train_on, "fast"):
    print(loss_error, gradient_error, report.splitlines()[0])
"""


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The Python of a new environment, which sees what is installed here, and in which nothing else is yet."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (packages / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return environment / "bin" / "python"


def run(command: list[str], folder: Path, python: Path, **variables: str) -> str:
    without_network = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "250"}
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = os.environ | without_network | variables | {"PATH": path}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_two_words_make_a_package_that_is_installed_tested_and_trains(fresh: Path, tmp_path: Path) -> None:
    leftovers = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(TEMPLATE, tmp_path / "here" / "backends" / "template", ignore=leftovers)
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```$", _section("Add a kernel"), re.DOTALL | re.MULTILINE)
    told = run(["bash", "-ec", "".join(blocks)], tmp_path / "here", fresh)
    assert "1 passed" in told
    row = next(line for line in told.splitlines() if line.startswith("fast "))
    assert "yes" in row
    assert "fast_attention 0.1.0 (fast): fast" in told
    assert "softcap: fast has no softcap" in told
    files = sorted(file for file in (tmp_path / "fast_attention").iterdir() if file.is_file())
    assert [file.name for file in files] == ["fast_attention.py", "pyproject.toml", "test_kernel.py"]
    assert not any(word in file.read_text() for file in files for word in ("my_package", "my_kernel"))
    # Away from its folder, so that it is the installed package that trains.
    trained = run([str(fresh), "-c", TRAIN], tmp_path, fresh, PYTHONPATH=str(Path(__file__).parent)).splitlines()
    assert len(trained) == 2
    for line in trained:
        loss_error, gradient_error, report = line.split(" ", 2)
        assert float(loss_error) < 1e-6
        assert float(gradient_error) < 1e-5
        assert "kernel 'fast'" in report


def test_the_template_is_short_and_contributing_shows_all_of_it() -> None:
    source = (TEMPLATE / "my_package.py").read_text()
    assert len(source.splitlines()) < 40
    shown = re.findall(r"^ *```python\n(.*?)^ *```$", _section("Add a kernel"), re.DOTALL | re.MULTILINE)
    assert [re.sub("^   ", "", block, flags=re.MULTILINE) for block in shown] == [source]


def _section(heading: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]
