"""docs/flash.md is true: its table is what the kernels say, and its plugin for kernels of the Hub works."""

import re
from pathlib import Path
from typing import Any

import page
import pytest
import torch
from test_flash_kit import REFUSED
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sp_attention import registry, testing

TEXT = (Path(__file__).parents[3] / "docs" / "flash.md").read_text()
HUB = "kernels-community/flash-attn2"
# What a kernel's folder has for one build of it: here Python only, for torch on the CPU.
METADATA = """{"name": "flash-attn2", "version": 1, "id": "flash_attn2_stand_in", "license": "BSD-3-Clause",
"upstream": "https://github.com/Dao-AILab/flash-attention", "source": "https://github.com/Dao-AILab/flash-attention",
"kernels": {}, "python-depends": [], "backend": {"type": "cpu"}}"""


def test_the_table_is_what_the_kernels_say() -> None:
    assert page.table() in TEXT


@pytest.mark.usefixtures("on_the_cpu")
def test_the_plugin_for_kernels_of_the_hub_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tmp_path / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(METADATA)
    (build / "__init__.py").write_text("from flash_attn import flash_attn_func, flash_attn_varlen_func\n")
    monkeypatch.setenv("LOCAL_KERNELS", f"{HUB}={tmp_path}")
    (code,) = re.findall(r"^```py\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    (backend,) = names["sp_attention_backends"]()
    assert names["HUB"].load().__file__ == str(build / "__init__.py")
    testing.conform(backend, REFUSED, dtype=torch.bfloat16)


def test_keys_of_the_hub_are_listed_by_transformers_name_and_cannot_be_used_yet() -> None:
    ALL_ATTENTION_FUNCTIONS.register(HUB, lambda *args, **options: None)
    try:
        (entry,) = [one for one in registry.load().backends if one.backend.kernel == f"transformers:{HUB}"]
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[HUB]
    assert "its mask does not travel as a tensor, which is not covered yet" in (entry.problem or "")
