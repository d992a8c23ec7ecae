"""torch-npu is installed and its driver is not, or not used: a reason with a cure, and nothing is broken."""

import os
import re
import subprocess
import sys

import pytest
import standin  # noqa: F401  # registers the stand-ins
import torch
from sp_attention_npu import availability

from sp_attention.errors import BackendError
from sp_attention.kernels.registry import find, load

REASON = (
    "torch-npu is installed, and Ascend's CANN is not found (libhccl.so: cannot open shared object file: No such file "
    "or directory): source its set_env.sh, or uninstall torch-npu; until then `import torch` needs "
    "TORCH_DEVICE_BACKEND_AUTOLOAD=0, and transformers cannot be imported"
)


def python(*arguments: str, driver: bool = False, autoload: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter of this environment, which has the real torch-npu."""
    environment = {name: value for name, value in os.environ.items() if driver or name != "LD_LIBRARY_PATH"}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = str(int(autoload))
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_torch_itself_says_how_to_import_it_without_a_driver() -> None:
    ran = python("-c", "import torch", autoload=True)
    assert ran.returncode != 0
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in ran.stderr


def test_transformers_itself_cannot_be_imported_without_a_driver() -> None:
    ran = python("-c", "import transformers.modeling_utils")
    assert ran.stderr.splitlines()[-1].startswith("ImportError: libhccl.so")


def test_all_else_works_without_a_driver_and_the_reason_is_told() -> None:
    code = """
import sys, sp_attention
from sp_attention.kernels import registry
from sp_attention import testing
found = registry.load()
(npu,) = [entry for entry in found.backends if entry.backend.device == "npu"]
print(npu.problem)
print(*(f"{broken.plugin}: {broken.reason}" for broken in found.broken), sep="; ")
assert testing.check(registry.find("cpu", "sdpa"), "packed documents") is None
assert "torch_npu" not in sys.modules
"""
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr
    reason, broken = ran.stdout.splitlines()
    assert reason == REASON
    # transformers' own import fails, and this library's plugin for transformers' kernels says so.
    assert "(transformers): ImportError: libhccl.so" in broken
    assert ";" not in broken


def test_the_command_line_lists_the_reason() -> None:
    ran = python("-m", "sp_attention", "backends")
    assert ran.returncode == 0, ran.stderr
    assert "CANN is not found" in " ".join(re.sub("[│┃]", " ", ran.stdout).split())


def test_after_a_failed_import_the_reason_is_the_same() -> None:
    ran = python(
        "-c",
        "import torch\n"
        "try:\n    import torch_npu\nexcept ImportError as error:\n    print(error)\n"
        "from sp_attention_npu.availability import unavailable\nprint(unavailable())\n",
    )
    assert ran.stdout.splitlines()[-1] == REASON, ran.stderr


def test_with_a_driver_it_must_be_imported() -> None:
    ran = python("-c", "from sp_attention_npu.availability import unavailable\nprint(unavailable())", driver=True)
    assert ran.stdout.strip() == (
        "torch-npu is not imported: unset TORCH_DEVICE_BACKEND_AUTOLOAD, or import torch_npu before sp_attention"
    )


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    version = torch.__version__.split("+")[0]
    expected = f"torch-npu is not installed: pip install torch-npu of the same version as torch, which is {version}"
    assert availability.unavailable() == expected


def test_says_that_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.get_device_module("npu"), "is_available", lambda: False)
    reason = "torch-npu finds no NPU: see `npu-smi info`, and the variable ASCEND_RT_VISIBLE_DEVICES"
    assert availability.unavailable() == reason
    with pytest.raises(BackendError, match="backend 'npu' on npu cannot be used: torch-npu finds no NPU"):
        find("npu", "npu")


def test_is_available_here() -> None:
    assert [entry.problem for entry in load().backends if entry.backend.device == "npu"] == [None]
