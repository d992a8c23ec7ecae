"""docs/flash.md is true: its table is what the kernels say, and a kernel of the Hub is reached by its name."""

from pathlib import Path

import page
import pytest
import sp_attention_flash
import torch
from sp_attention_flash.packages import HUB2
from test_flash_conformance import REFUSED
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sp_attention import testing
from sp_attention.kernels import registry

TEXT = (Path(__file__).parents[3] / "docs" / "flash.md").read_text()
HUB = "kernels-community/flash-attn2"
# What a kernel's folder has for one build of it: here Python only, for torch on the CPU.
METADATA = """{"name": "flash-attn2", "version": 4, "id": "flash_attn2_stand_in", "license": "BSD-3-Clause",
"upstream": "https://github.com/Dao-AILab/flash-attention", "source": "https://github.com/Dao-AILab/flash-attention",
"kernels": {}, "python-depends": [], "backend": {"type": "cpu"}}"""


def test_the_table_is_what_the_kernels_say() -> None:
    assert page.table() in TEXT


@pytest.mark.usefixtures("on_the_cpu")
def test_a_kernel_of_the_hub_is_reached_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tmp_path / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(METADATA)
    (build / "__init__.py").write_text("from flash_attn import flash_attn_func, flash_attn_varlen_func\n")
    monkeypatch.setenv("LOCAL_KERNELS", f"{HUB}={tmp_path}")
    (backend,) = [one for one in sp_attention_flash.sp_attention_backends() if one.kernel == f"transformers:{HUB}"]
    assert f"transformers:{HUB}" in TEXT
    assert HUB2.load().__file__ == str(build / "__init__.py")
    testing.conform(backend, REFUSED, dtype=torch.bfloat16)


def test_what_transformers_has_loaded_from_the_hub_is_not_in_the_way() -> None:
    ALL_ATTENTION_FUNCTIONS.register(HUB, lambda *args, **options: None)
    try:
        (entry,) = [one for one in registry.load().backends if one.backend.kernel == f"transformers:{HUB}"]
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[HUB]
    assert (entry.problem or "").startswith(f"torch {torch.__version__} is built without CUDA")
