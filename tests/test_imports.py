"""What importing the library, and listing its kernels, brings in; each in a fresh interpreter."""

import re
import subprocess
import sys
from importlib.metadata import requires

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


def test_the_library_asks_for_torch_transformers_and_pluggy_only() -> None:
    needed = {re.split(r"[^\w-]", line)[0] for line in requires("sp-attention") or [] if "extra ==" not in line}
    assert needed == {"torch", "transformers", "pluggy"}


def test_the_command_line_without_its_extra_says_in_one_line_what_to_install() -> None:
    absent = "find_spec = lambda name: None if name in ('rich', 'matplotlib') else real(name)"
    code = f"import importlib.util; real = importlib.util.find_spec; importlib.util.{absent}; import runpy; "
    ran = subprocess.run(
        [sys.executable, "-c", code + "runpy.run_module('sp_attention', run_name='__main__')"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    line = "sp-attention: the command line needs rich, matplotlib: pip install 'sp-attention[cli]'"
    assert ran.stderr == f"{line} (in a checkout: '.[cli]')\n"
