"""What importing the library, and listing its kernels, brings in; each in a fresh interpreter."""

import subprocess
import sys

import pytest

HEAVY = ("accelerate", "deepspeed", "flash_attn", "flash_attn_interface", "torch_npu", "kernels", "peft", "trl")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_brings_no_kernel_package_and_no_engine() -> None:
    code = f"import sys, sp_attention; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code) == "[]"


def test_importing_brings_no_model_code() -> None:
    assert run("import sys, sp_attention; print('transformers.modeling_utils' in sys.modules)") == "False"


@pytest.mark.parametrize("use", ["sp_attention.Backend", "registry.load().broken == ()"])
def test_works_when_every_kernel_package_is_poisoned(use: str) -> None:
    kernels = ("deepspeed", "flash_attn", "flash_attn_interface", "torch_npu", "kernels")
    poison = f"import sys; sys.modules.update(dict.fromkeys({kernels}))"
    library = "import sp_attention; from sp_attention.kernels import registry"
    assert run(f"{poison}; {library}; assert {use}; print('fine')") == "fine"


def test_kernels_are_not_imported_by_importing_the_registry() -> None:
    kernels = ["sp_attention.kernels.sdpa", "sp_attention.kernels.transformers"]
    code = f"import sys, sp_attention.kernels.registry; print([name for name in {kernels} if name in sys.modules])"
    assert run(code) == "[]"
